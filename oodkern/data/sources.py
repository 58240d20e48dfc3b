"""From the names of a configuration to an OODSplit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from oodkern.data.arrays import read_array
from oodkern.data.embedded import FAR_PATCHES, as_canvases, photo_patches, read_digits
from oodkern.data.images import ArraySet, DataError, ImageSet
from oodkern.data.lists import read_image_list
from oodkern.data.multilabel import read_coco, read_voc
from oodkern.data.options import EMBEDDED, OWN, DataConfig, check, check_names, check_new, kind_of
from oodkern.data.readers import Parts, read_cifar, read_folder, read_idx_folder
from oodkern.data.shards import read_shards
from oodkern.data.split import (
    ClassSplit,
    OODSplit,
    at_most,
    generator_of,
    hold_out,
    mixed_images,
    of_classes,
    seen_in,
    split_classes,
    unseen,
    without_known_classes,
    without_shared_images,
)
from oodkern.data.svhn import read_svhn

# What suits the images of a kind: augmentation of ID images, and of outliers. Letters that are white strokes on black
# teach that strokes are unknown and nothing of textures, which the energy then takes for clothes: with Fashion-MNIST as
# the ID set AUROC on textures is 44 before fine-tuning, 29 after it with "crop", and 100 with "vary+crop".
SUITABLE = {
    "digits": ("none", "vary"),
    "digits-multilabel": ("none", "vary"),
    "idx": ("crop", "vary+crop"),
    "emnist": ("crop", "vary+crop"),
    "cifar10": ("crop+flip", "crop+flip"),
    "cifar100": ("crop+flip", "crop+flip"),
    "svhn": ("crop", "crop+flip"),  # a digit that is flipped is none
    "folder": ("crop+flip", "crop+flip"),
    "npy": ("crop+flip", "crop+flip"),
    "imglist": ("crop+flip", "crop+flip"),
    "wds": ("crop+flip", "crop+flip"),
    "voc": ("crop+flip", "crop+flip"),
    "coco": ("crop+flip", "crop+flip"),
}
TEST_SHARE = 0.3  # of the ID images, where a set has no test part of its own


def open_source(source: str, channels: int, size: int, split: int | None = None, resize: str = "stretch") -> Parts:
    """The official parts of a source. `channels` and `size` are those of decoded files, and of photos.

    `resize`, of image files: "stretch", the whole image to `size` x `size`, or "center-crop", the shorter side to 8/7
    of `size`, then the middle.
    """
    kind, path = kind_of(source)
    if kind == "photos":
        return {"all": photo_patches(FAR_PATCHES, channels, size, split)}
    if kind in EMBEDDED:
        return {"all": read_digits()}
    if kind in ("imglist", "wds", "npy"):  # whose path is no folder
        if kind == "imglist":
            return read_image_list(path, channels, size, resize)
        return read_shards(path, channels, size, resize) if kind == "wds" else read_array(Path(path).expanduser())
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{source}: expected a folder, and {root} is none")
    of_files = {"folder": read_folder, "voc": read_voc, "coco": read_coco}
    if kind in of_files:
        return of_files[kind](root, channels, size, resize)
    if kind == "svhn":
        return read_svhn(root)
    if kind.startswith("cifar"):
        return read_cifar(root, int(kind.removeprefix("cifar")))
    return read_idx_folder(root, transposed=kind == "emnist")


def conform(images: ImageSet, channels: int, size: int) -> ImageSet:
    """Images in memory made [channels, size, size], as files are when they are decoded."""
    if not isinstance(images, ArraySet) or images.array.shape[1:] == (channels, size, size):
        return images
    array: Tensor = images.array
    if array.shape[1] != channels:
        grey = array.float().mean(1, keepdim=True)
        array = (grey.round().to(array.dtype) if array.dtype == torch.uint8 else grey).expand(-1, channels, -1, -1)
    if array.shape[2:] != (size, size):
        resized = interpolate(array.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
        array = resized.round().to(array.dtype) if array.dtype == torch.uint8 else resized
    return ArraySet(array.contiguous(), images.labels, images.classes)


def part_of(parts: Parts, name: str) -> ImageSet:
    """The official part of that name; of a set without parts, all of it."""
    return parts[name] if name in parts else next(iter(parts.values()))


def class_sizes(data: DataConfig, count: int) -> list[int]:
    if data.classes:
        return list(data.classes)
    held = max(round(0.2 * count), 1)
    # Sets from disk hold classes out for what no source is given for; the embedded ones always for the test.
    outliers, ood = 0 if data.outliers else held, 0 if data.ood and data.name not in EMBEDDED else held
    return [count - outliers - ood, outliers, ood]


def build_split(data: DataConfig) -> OODSplit:
    """The parts that a configuration describes. Outliers, OOD and ID images are apart, see `without_shared_images`.

    Raises ValueError naming the key, and DataError naming the file.
    """
    return ready(as_opened(data), data)


def as_opened(data: DataConfig) -> OODSplit:
    """The parts of `build_split` before images that are in two of them are left out, and whether any is empty."""
    check(data)
    kind, _ = kind_of(data.name)
    if kind == OWN:
        raise ValueError(
            f"data.name: the images of {data.name} were given by a program, which alone can give them again"
        )
    parts = open_source(data.name, data.channels or 3, data.size or 32, data.split, data.resize)
    shape = next(iter(parts.values())).shape
    channels, size = data.channels or shape[0], data.size or max(shape[1:])
    parts = {name: conform(images, channels, size) for name, images in parts.items()}
    labelled = part_of(parts, "train")
    count = len(labelled.classes)
    if count < 2:
        how = ", one folder for each class" if kind == "folder" else ""
        raise DataError(f"{data.name}: expected images of two classes at least{how}")
    sizes = class_sizes(data, count)
    chosen = split_classes(count, sizes, data.split)
    split = split_images(data, parts, chosen)
    if kind == "digits-multilabel":
        split = as_canvases(split, data.split)
    ood = dict(split.test_ood)
    far = {"far": "photos"} if kind in EMBEDDED else {}
    check_new(data.ood, {**ood, **far})
    for name, source in {**far, **data.ood}.items():
        ood[name], split = open_unknown(split, source, "test", data.split)
    outliers, outlier_validation = split.outliers, split.outlier_validation
    if data.outliers:
        images, split = open_unknown(split, data.outliers, "train", data.split)
        outliers, outlier_validation = hold_out(images, data.validation, generator_of(data.split, 5))
    for key, nothing in (("data.outliers", not data.outliers and not len(outliers)), ("data.ood", not ood)):
        if nothing:
            raise ValueError(f"{key}: expected a source, or classes held out by data.classes (now {sizes})")
    augment, augment_outliers = SUITABLE[kind]
    split = replace(
        split,
        test_ood=ood,
        outliers=outliers,
        outlier_validation=outlier_validation,
        augmentation=augment,
        outlier_augmentation=augment_outliers,
    )
    return split


def open_unknown(split: OODSplit, source: str, part: str, number: int | None) -> tuple[ImageSet, OODSplit]:
    """A part of a source as outliers of the split's shape, less its classes that the ID set has; the latter counted."""
    channels, size, _ = split.train.shape
    images = part_of(open_source(source, channels, size, number, split.resize), part)
    others, names = without_known_classes(images, split.classes)
    split = replace(
        split,
        namesakes={**split.namesakes, **({source: names} if names else {})},
        namesake_images=split.namesake_images + len(images) - len(others),
    )
    return conform(others.as_outliers(), channels, size), split


def ready(split: OODSplit, data: DataConfig) -> OODSplit:
    """A split as training takes it: no image shared, no part empty, augmented as the configuration asks.

    Raises DataError for a part without images, ValueError for an OOD set's name.
    """
    check_names(split.test_ood)
    split = without_shared_images(split)
    check_parts(split)
    chosen = {name: getattr(data, name) for name in ("augmentation", "outlier_augmentation")}
    return replace(split, resize=data.resize, **{name: asked for name, asked in chosen.items() if asked != "auto"})


def check_parts(split: OODSplit) -> None:
    """Raises DataError for a part without images."""
    if not split.test_ood:
        raise DataError(f"{split.name}: expected one OOD set to test with at least, and there is none")
    parts = {
        "ID images to train with": split.train,
        "ID images to validate with": split.validation,
        "ID images to test with": split.test,
        "outliers to train with": split.outliers,
        "outliers to validate with": split.outlier_validation,
        **{f"OOD images of {name!r}": images for name, images in split.test_ood.items()},
    }
    for name, images in parts.items():
        if not len(images):
            left = "; ".join(f"{count:,} images were left out, {reason}" for reason, count in split.left_out.items())
            raise DataError(f"{split.name}: expected {name}, and there are none{f' ({left})' if left else ''}")


def with_more_ood(split: OODSplit, sources: Mapping[str, str], number: int | None) -> OODSplit:
    """The split with further OOD sets, NAME: SOURCE, less the images that a model of it was trained with.

    Left out too are classes that the ID set has.
    """
    seen = seen_in(split.train, split.validation, split.test, split.outliers, split.outlier_validation)
    more = dict(split.test_ood)
    dropped = 0
    check_new(sources, split.test_ood)
    for name, source in sources.items():
        images, split = open_unknown(split, source, "test", number)
        more[name] = unseen(images, seen)
        dropped += len(images) - len(more[name])
    split = replace(split, test_ood=more, dropped=split.dropped + dropped)
    check_parts(split)
    return split


def split_images(data: DataConfig, parts: Parts, chosen: ClassSplit) -> OODSplit:
    """The ID, outlier and near OOD images of one labelled set."""
    known = of_classes(part_of(parts, "train"), chosen.known)
    if len(known) < 2 * len(chosen.known):
        raise DataError(f"{data.name}: expected two images of each class at least, to train and to validate with")
    if "test" in parts:
        training, test = known, of_classes(parts["test"], chosen.known)
    else:
        training, test = hold_out(known, TEST_SHARE, generator_of(data.split, 3))
    training = at_most(training, data.limit, generator_of(data.split, 6))
    train, validation = hold_out(training, data.validation, generator_of(data.split, 4))
    outliers = of_classes(part_of(parts, "train"), chosen.outliers)
    outliers, outlier_validation = hold_out(outliers, data.validation, generator_of(data.split, 5))
    ood: dict[str, ImageSet] = {}
    if chosen.ood:
        ood["near"] = of_classes(part_of(parts, "test"), chosen.ood).as_outliers()
    name = data.name if data.split is None else f"{data.name} split {data.split}"
    classes = tuple(known.classes)
    return OODSplit(
        name,
        train,
        validation,
        test,
        outliers.as_outliers(),
        outlier_validation.as_outliers(),
        ood,
        classes,
        multi_label=known.labels.dim() == 2,
        mixed=sum(mixed_images(images, chosen) for images in parts.values()),
        resize=data.resize,
    )
