"""Image lists as OpenOOD has them: a text file with `relative/path label` a line, label -1 for OOD images.

Its layout (https://github.com/Jingkang50/OpenOOD) is ROOT/benchmark_imglist/cifar10/train_cifar10.txt for images such
as ROOT/images_classic/cifar10/train/airplane/0001.png, written `cifar10/train/airplane/0001.png 0`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from oodkern.data.images import UNKNOWN, DataError, FolderSet, ImageSet

IMAGE_FOLDERS = ("", "images_classic", "images_largescale")


def list_and_root(path: str) -> tuple[Path, Path | None]:
    """The list and the folder of its images, None where it is to be found, of FILE or FILE@ROOT."""
    file, at, root = path.rpartition("@")
    if at and file and root and not Path(path).expanduser().is_file():  # a folder above it may have an @ in its name
        return Path(file).expanduser(), Path(root).expanduser()
    return Path(path).expanduser(), None


def read_list(file: Path) -> tuple[list[str], list[int]]:
    """The paths and the labels of a list. The label is what stands behind the last space; blank lines mean nothing."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: expected text in UTF-8, `path label` a line") from None
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        words = line.strip().rsplit(maxsplit=1)
        if not words:
            continue
        try:
            path, label = words[0], int(words[1])
        except (IndexError, ValueError):
            raise DataError(f"{file}: line {number}: expected `path label`, got {line.strip()[:100]!r}") from None
        if label < UNKNOWN:
            raise DataError(f"{file}: line {number}: expected a label from -1 (OOD) on, got {label}")
        paths.append(path)
        labels.append(label)
    if not paths:
        raise DataError(f"{file}: expected `path label` lines, found none")
    return paths, labels


def folder_of_images(file: Path, root: Path | None, first: str) -> Path:
    """The folder that the paths of a list begin in.

    Of the root, or else of the list's folder and the folders above it, and of OpenOOD's folders of images in each, it
    is the first with the list's first image.
    """
    above = [root] if root is not None else list(file.absolute().parents)
    found = (one / name for one in above for name in IMAGE_FOLDERS if (one / name / first).is_file())
    if (folder := next(found, None)) is not None:
        return folder
    if root is not None:
        return root  # what is missing is told with its number
    raise DataError(
        f"{file}: its first image, {first}, is neither below {file.absolute().parent} nor below a folder above it; "
        f"expected imglist:FILE@ROOT with ROOT the folder of the images"
    )


def check_there(source: Path, folder: Path, paths: Sequence[str]) -> None:
    """Raises DataError naming the first file that is missing. A folder is listed once for all of its files."""
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        inside, name = os.path.split(path)
        if inside not in there:
            try:
                there[inside] = set(os.listdir(folder / inside))
            except OSError:
                there[inside] = set()
        if name not in there[inside]:
            missing.append(path)
    if missing:
        count = f"{len(missing):,} of the {len(paths):,} of {source} are missing"
        raise DataError(f"{folder / missing[0]}: no such image; {count}")


def folder_names(paths: Iterable[str], labels: Iterable[int]) -> dict[int, str]:
    """Label to folder where each label has a folder of its own and each folder one label; nothing where not."""
    folders = (os.path.basename(os.path.dirname(path)) for path in paths)
    pairs = {(label, folder) for folder, label in zip(folders, labels, strict=True) if label >= 0}
    names = dict(pairs)
    one_to_one = len(names) == len(set(names.values())) == len(pairs) > 1
    return names if one_to_one and all(names.values()) else {}


def class_names(lists: Iterable[tuple[list[str], list[int]]]) -> dict[int, str]:
    """Label to name: the folders' where a list has them one to one and no other contradicts, or else the number.

    ImageNet's training images lie in folders of their wnids, its validation images in one folder.
    """
    names: dict[int, str] = {}
    present: set[int] = set()
    contradicted = False
    for paths, labels in lists:
        present.update(label for label in labels if label >= 0)
        found = folder_names(paths, labels)
        contradicted |= any(names.get(label, name) != name for label, name in found.items())
        names |= found
    if contradicted or len(set(names.values())) < len(names):
        names = {}
    return {label: names.get(label, str(label)) for label in sorted(present)}


def read_image_list(path: str, channels: int = 3, size: int = 32, resize: str = "stretch") -> Mapping[str, ImageSet]:
    """The parts of FILE or FILE@ROOT: train and test of train*.txt beside test*.txt, or else the whole list.

    Classes are the labels there are, in their order. Raises DataError naming the list, or an image that is missing.
    """
    file, root = list_and_root(path)
    files = {"all": file}
    if file.name.startswith("train"):
        test = file.with_name("test" + file.name.removeprefix("train"))
        files = {"train": file, "test": test} if test.is_file() else files
    lists = {part: read_list(one) for part, one in files.items()}
    names = class_names(lists.values())
    numbers = np.array(sorted(names), dtype=np.int64)
    parts = {}
    for part, (images, labels) in lists.items():
        folder = folder_of_images(files[part], root, images[0])
        check_there(files[part], folder, images)
        given = np.array(labels, dtype=np.int64)
        known = np.where(given < 0, UNKNOWN, np.searchsorted(numbers, given))
        classes = [names[label] for label in numbers.tolist()]
        found = [folder / image for image in images]
        parts[part] = FolderSet(found, torch.from_numpy(known), classes, channels, size, resize)
    return parts
