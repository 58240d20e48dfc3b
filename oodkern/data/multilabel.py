"""Multi-label sets of photographs: Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC) and COCO (https://cocodataset.org).

An image's labels are the classes of the objects on it, [N, K] of 0 and 1. Images without any are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.data.images import DataError, FolderSet, ImageSet

VOC_CLASSES: tuple[str, ...] = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
COCO_YEARS = (2017, 2014)
KEYS = frozenset(("images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id"))
PARTS = {"train": "train", "test": "val"}  # what is tested on, where labels of the test part are not published


def multi_hot(pairs: Collection[tuple[int, int]], rows: int, columns: int) -> Tensor:
    """[rows, columns] float32, 1 at the pairs of row and column."""
    labels = torch.zeros(rows, columns)
    if pairs:
        labels[tuple(torch.tensor(list(pairs)).T)] = 1
    return labels


class Annotation(ElementTree.TreeBuilder):
    """Without a document type, whose entities could make a small file a very large one."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("expected no document type (<!DOCTYPE>)")


def read_annotation(path: Path) -> set[int]:
    """The classes of the objects of an annotation of VOC that are not marked as difficult."""
    try:
        with open(path, "rb") as file:
            root = ElementTree.parse(file, ElementTree.XMLParser(target=Annotation())).getroot()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (DataError, ElementTree.ParseError, ValueError, LookupError) as error:  # of encodings: the last two
        text = str(error) if isinstance(error, DataError) else f"not readable XML ({brief(error)})"
        raise DataError(f"{path}: {text}") from None
    if root.tag != "annotation":
        raise DataError(f"{path}: expected <annotation>, got <{root.tag}>")
    found = set()
    for thing in root.iterfind("object"):
        name = thing.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise DataError(f"{path}: expected an object of the 20 classes of VOC, got {name!r}")
        if thing.findtext("difficult", "0").strip() in ("", "0"):
            found.add(VOC_CLASSES.index(name))
    return found


def names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from None


def voc_folder(root: Path) -> Path:
    """The folder itself, or the latest VOC* of one in it or in its VOCdevkit."""
    inside = [one for folder in (root, root / "VOCdevkit") for one in sorted(folder.glob("VOC*"), reverse=True)]
    for one in (root, *inside):
        if (one / "Annotations").is_dir() and (one / "ImageSets" / "Main").is_dir():
            return one
    raise DataError(f"{root}: expected VOC2007 or VOC2012 with Annotations, ImageSets/Main and JPEGImages, found none")


def read_voc(root: Path, channels: int = 3, size: int = 32, resize: str = "stretch") -> Mapping[str, ImageSet]:
    """The parts of VOC2007 or VOC2012, the folder itself or one above it (of several, the latest).

    test is ImageSets/Main/test.txt, with trainval.txt for train, where the annotations of all of its images are there
    (VOC2012's are not published); otherwise val.txt is test and train.txt train. What is there alone is the whole set.
    """
    folder = voc_folder(root)
    listed: dict[str, list[str]] = {}
    for name in ("train", "val", "trainval", "test"):
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        if path.is_file():
            listed[name] = [line.split()[0] for line in path.read_text(errors="replace").splitlines() if line.strip()]
    annotated, pictures = names_in(folder / "Annotations"), names_in(folder / "JPEGImages")
    if "test" in listed and not all(f"{name}.xml" in annotated for name in listed["test"]):
        del listed["test"]
    chosen = PARTS
    if "test" in listed:
        chosen = {"train": "trainval" if "trainval" in listed else "train", "test": "test"}
    parts = {part: listed[name] for part, name in chosen.items() if name in listed}
    if len(parts) < 2:
        alone = next((listed[name] for name in ("trainval", "train", "val", "test") if name in listed), None)
        if alone is None:
            raise DataError(f"{folder}: expected train.txt and val.txt in ImageSets/Main, found neither")
        parts = {"all": alone}
    found: dict[str, ImageSet] = {}
    for part, names in parts.items():
        check_listed([f"{name}.xml" for name in names], annotated, folder / "Annotations")
        check_listed([f"{name}.jpg" for name in names], pictures, folder / "JPEGImages")
        pairs = [
            (i, k) for i, name in enumerate(names) for k in read_annotation(folder / "Annotations" / f"{name}.xml")
        ]
        paths = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
        labels = multi_hot(pairs, len(names), len(VOC_CLASSES))
        found[part] = labelled(FolderSet(paths, labels, VOC_CLASSES, channels, size, resize), folder)
    return found


def labelled(images: FolderSet, source: Path) -> FolderSet:
    chosen = images.labels.any(1).nonzero().flatten()
    if not len(chosen):
        raise DataError(f"{source}: expected images with labelled objects, found none")
    return images.select(chosen)


def check_listed(names: Sequence[str], there: set[str], folder: Path) -> None:
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(f"{folder / missing[0]}: no such file; {len(missing):,} of {len(names):,} are missing")


def of_use(one: dict[str, Any]) -> dict[str, Any]:
    """An object of a file of COCO without outlines and boxes, which would take gigabytes till the file is read."""
    return {key: one[key] for key in KEYS & one.keys()}


def read_instances(path: Path) -> tuple[list[str], list[str], Tensor]:
    """The file names, the names of the categories in the order of their numbers, and the labels [N, K] of a file."""
    try:
        with open(path, "rb") as file:
            content: Any = json.load(file, object_hook=of_use)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({brief(error)})") from None
    try:
        names = {int(one["id"]): str(one["name"]) for one in content["categories"]}
        column = {number: k for k, number in enumerate(sorted(names))}
        row = {int(one["id"]): i for i, one in enumerate(content["images"])}
        files = [str(one["file_name"]) for one in content["images"]]
        pairs = {(row[one["image_id"]], column[one["category_id"]]) for one in content["annotations"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: expected images, annotations and categories as COCO's instances have them ({brief(error)})"
        ) from None
    return files, [names[number] for number in sorted(names)], multi_hot(pairs, len(files), len(names))


def read_coco(root: Path, channels: int = 3, size: int = 32, resize: str = "stretch") -> Mapping[str, ImageSet]:
    """train and val (called test) of 2017, or where its annotations are not there of 2014; one alone is the whole set.

    The annotations are annotations/instances_train2017.json, the images in train2017 or images/train2017.
    """
    for year in COCO_YEARS:
        files = {part: root / "annotations" / f"instances_{name}{year}.json" for part, name in PARTS.items()}
        if any(path.is_file() for path in files.values()):
            break
    else:
        raise DataError(f"{root}: expected annotations/instances_train2017.json and val2017, or 2014, found none")
    found: dict[str, ImageSet] = {}
    classes: list[str] | None = None
    for part, name in PARTS.items():
        if not files[part].is_file():
            continue
        pictures, categories, labels = read_instances(files[part])
        if classes is not None and categories != classes:
            raise DataError(f"{files[part]}: expected the categories of {files['train'].name}, got others")
        classes = categories
        folder = next((one for one in (root, root / "images") if (one / f"{name}{year}").is_dir()), root)
        folder = folder / f"{name}{year}"
        paths = [folder / one for one in pictures]
        found[part] = labelled(FolderSet(paths, labels, classes, channels, size, resize), files[part])
        check_listed([pictures[i] for i in labels.any(1).nonzero().flatten()], names_in(folder), folder)
    return found if len(found) == 2 else {"all": next(iter(found.values()))}
