"""The keys that name a data set, and what is wrong with some values, before any file is opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from oodkern._options import option
from oodkern.data.augment import augmentation
from oodkern.data.lists import list_and_root

EMBEDDED = ("digits", "digits-multilabel")
OWN = "python"  # images that a program gave to `train`: known by name only
KINDS = ("idx", "emnist", "cifar10", "cifar100", "svhn", "folder", "imglist", "wds", "npy", "voc", "coco")
MULTI_LABEL = ("digits-multilabel", "voc", "coco")
RESIZES = ("stretch", "center-crop")
# Names of OOD sets that mean something else in scores.npz, or to the function that writes it.
RESERVED = ("id", "file", "allow_pickle")


@dataclass
class DataConfig:
    __doc__ = f"A source is KIND:PATH of {', '.join(KINDS)}."

    name: str = option("digits", "the labelled ID set: digits, digits-multilabel or a source")
    outliers: str = option("", "the source to train with; empty: held-out classes of the ID set")
    ood: dict[str, str] = option(
        {}, "further sets of the test, NAME: SOURCE; without any, sets from disk hold out classes, as near"
    )
    classes: list[int] = option([], "how many known, outlier and OOD classes; empty: as 6, 2, 2")
    split: int | None = option(None, "number of a random split of the classes and the images; null: the fixed one")
    validation: float = option(0.15, "share of the training images, and of the outliers")
    limit: int = option(0, "at most so many ID images to train with; 0: all")
    size: int = option(0, "pixels a side; 0: as the ID set has them, 32 for image files")
    channels: int = option(0, "1 or 3; 0: as the ID set has them, 3 for image files")
    resize: str = option(
        "stretch",
        "of image files: stretch, to size x size; center-crop, the shorter side to 8/7 of size, then the middle",
    )
    augmentation: str = option(
        "auto", "none; or crop, flip, vary, resized-crop, trivial, rand, jitter joined by +; auto: what suits the set"
    )
    outlier_augmentation: str = option("auto", "likewise")
    workers: int = option(0, "processes that make each stream's batches; they change no number")


def kind_of(source: str) -> tuple[str, str]:
    """The kind and the path of a source. Raises ValueError with the kinds there are."""
    kind, colon, path = source.partition(":")
    if source in EMBEDDED or source == "photos":
        return source, ""
    if kind == OWN:
        return kind, path
    if kind not in KINDS or not colon or not path:
        raise ValueError(f"expected digits, photos or KIND:PATH with KIND one of {', '.join(KINDS)}, got {source!r}")
    return kind, path


def is_multi_label(source: str) -> bool:
    return source.partition(":")[0] in MULTI_LABEL


def path_of(source: str) -> Path:
    """What tells a source's images: its folder, its list without the folder of the images, or its pattern."""
    kind, path = source.partition(":")[::2]
    return list_and_root(path)[0] if kind == "imglist" else Path(path).expanduser()


def location(source: str) -> tuple[str, Path]:
    """A source however its folder is written. CIFAR-10 and CIFAR-100 may share one."""
    kind = source.partition(":")[0]
    if kind not in KINDS:
        return source, Path()
    return kind if kind.startswith("cifar") else "", path_of(source).resolve()


def check(data: DataConfig) -> None:
    """Raises ValueError, before any file is opened, naming the key."""
    sources: Mapping[str, str] = {"data.name": data.name} | {f"data.ood.{name}": one for name, one in data.ood.items()}
    if data.outliers:
        sources = {**sources, "data.outliers": data.outliers}
    for key, source in sources.items():
        try:
            kind, _ = kind_of(source)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if kind == "photos" and key in ("data.name", "data.outliers"):
            raise ValueError(f"{key}: photos are for the test; expected another source")
        if kind in ("digits-multilabel", OWN) and key != "data.name":
            raise ValueError(f"{key}: expected digits or KIND:PATH, got {source!r}")
    check_names(data.ood)
    for key, source in sources.items():
        if key != "data.name" and source == "digits" and data.name in EMBEDDED:
            raise ValueError(f"{key}: the ID images are digits; expected other images")
        if key.startswith("data.ood") and source != "photos" and location(source) == location(data.outliers):
            raise ValueError(f"{key}: {source} is trained with; expected images that training never sees")
        if key != "data.name" and location(source) == location(data.name):
            raise ValueError(f"{key}: {source} is the ID set; expected other images")
    if data.name == "digits-multilabel" and (data.size or data.channels):
        raise ValueError(
            "data.size, data.channels: digits-multilabel has its own, 20 pixels of one channel; expected 0"
        )
    if not 0.01 <= data.validation <= 0.5:
        raise ValueError(f"data.validation: expected a share from 0.01 to 0.5, got {data.validation}")
    if data.resize not in RESIZES:
        raise ValueError(f"data.resize: expected one of {', '.join(RESIZES)}, got {data.resize!r}")
    if data.channels not in (0, 1, 3):
        raise ValueError(f"data.channels: expected 1 or 3, or 0 for those of the ID set, got {data.channels}")
    if data.size and not 8 <= data.size <= 4096:
        raise ValueError(f"data.size: expected 8 to 4096 pixels, or 0 for those of the ID set, got {data.size}")
    ranges = {"limit": (0, 2**40), "workers": (0, 256), "split": (0, 2**32)}
    for key, (low, high) in ranges.items():
        value = getattr(data, key)
        if value is not None and not low <= value <= high:
            raise ValueError(f"data.{key}: expected a number from {low} to {high:,}, got {value}")
    for key in ("augmentation", "outlier_augmentation"):
        if (names := getattr(data, key)) != "auto":
            try:
                augmentation(names)
            except ValueError as error:
                raise ValueError(f"data.{key}: {error}") from None


def check_names(names: Iterable[str]) -> None:
    for name in names:
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
            raise ValueError(
                f"data.ood.{name}: expected a name of letters, digits, - and _ (not {', '.join(RESERVED)})"
            )


def check_new(names: Iterable[str], taken: Iterable[str]) -> None:
    for name in set(names) & set(taken):
        raise ValueError(f"data.ood.{name}: there is an OOD set of that name; expected another name")
