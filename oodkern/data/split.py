"""What a data set for OOD detection consists of, and how the classes of a labelled set become one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkern.data.images import ArraySet, ImageSet


@dataclass(frozen=True)
class OODSplit:
    """ID images to train, validate and test on, outliers to train and validate with, and OOD images never trained with.

    train, validation, test: of the ID classes. Validation chooses the best checkpoint and the threshold.
    outliers, outlier_validation: labelled -1.
    test_ood: a name ("near", "far") to images.
    augmentation, outlier_augmentation: what suits the set, as names for `oodkern.data.augmentation`.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    outliers: ImageSet
    outlier_validation: ImageSet
    test_ood: Mapping[str, ImageSet]
    classes: tuple[str, ...]
    multi_label: bool = False
    augmentation: str = "none"
    outlier_augmentation: str = "none"

    def describe(self) -> str:
        ood = ", ".join(f"{len(images):,} {name}" for name, images in self.test_ood.items())
        kind = "labels" if self.multi_label else "classes"
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.validation):,} validation and {len(self.test):,} "
            f"test images of {len(self.classes)} {kind}; {len(self.outliers):,} outliers to train with and "
            f"{len(self.outlier_validation):,} to validate; test OOD {ood}"
        )


class ClassSplit(NamedTuple):
    """Which classes are known, which are outliers, which are the OOD of the test."""

    known: tuple[int, ...]
    outliers: tuple[int, ...]
    ood: tuple[int, ...]


def generator_of(split: int | None, purpose: int) -> np.random.Generator:
    """Random numbers of a split (None: the fixed one), a sequence for each purpose."""
    return np.random.Generator(np.random.Philox(key=[0 if split is None else split + 1, purpose]))


def split_classes(count: int, sizes: Sequence[int], split: int | None) -> ClassSplit:
    """`count` classes into known, outliers and OOD of the given sizes: in order, or a random split by its number."""
    if len(sizes) != 3 or min(sizes) < 0 or sizes[0] < 2 or sum(sizes) > count:
        raise ValueError(
            "data.classes: expected three numbers (two known classes at least, outliers, OOD) whose sum is at most "
            f"the {count} classes there are, got {list(sizes)}"
        )
    chosen = list(range(count)) if split is None else generator_of(split, 0).permutation(count).tolist()
    first, second, third = np.cumsum(sizes).tolist()
    parts = (chosen[:first], chosen[first:second], chosen[second:third])
    return ClassSplit(*(tuple(sorted(part)) for part in parts))


def of_classes(images: ImageSet, classes: Sequence[int]) -> ImageSet:
    """The images of some classes, renumbered 0, 1, ... in the order given."""
    number = torch.full((max(len(images.classes), 1),), -1)
    number[list(classes)] = torch.arange(len(classes))
    known = images.labels >= 0
    labels = torch.where(known, number[images.labels.clamp_min(0)], -1)
    indices = (labels >= 0).nonzero().flatten()
    names = [images.classes[c] for c in classes]
    return images.select(indices).relabelled(labels[indices], names)


def hold_out(images: ImageSet, share: float, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    """Two parts, the second with `share` of each class: rounded, one image at least where the class has two."""
    labels = images.labels.numpy() if images.labels.dim() == 1 else np.zeros(len(images), dtype=np.int64)
    held = np.zeros(len(images), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return images.select(torch.from_numpy(np.flatnonzero(~held))), images.select(torch.from_numpy(np.flatnonzero(held)))


def digests(images: ImageSet) -> list[bytes]:
    """A hash of the pixels of each image of a set in memory."""
    if not isinstance(images, ArraySet):
        return []
    return [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in images.array.numpy()]


def without_shared_images(split: OODSplit) -> tuple[OODSplit, int]:
    """The split less the outliers that are test images or ID images, and less the test OOD images that were trained on.

    For sets in memory, by their pixels; returns how many were dropped. Three images of CIFAR-100 are in CIFAR-10.
    """
    known = set(digests(split.train)) | set(digests(split.validation)) | set(digests(split.test))
    dropped = 0

    def keep(images: ImageSet, seen: set[bytes]) -> ImageSet:
        nonlocal dropped
        fresh = [i for i, digest in enumerate(digests(images)) if digest not in seen]
        if not isinstance(images, ArraySet) or len(fresh) == len(images):
            return images
        dropped += len(images) - len(fresh)
        return images.select(torch.tensor(fresh, dtype=torch.int64))

    ood = {name: keep(images, known) for name, images in split.test_ood.items()}
    seen = known.union(*(digests(images) for images in ood.values()))
    outliers, outlier_validation = keep(split.outliers, seen), keep(split.outlier_validation, seen)
    return replace(split, test_ood=ood, outliers=outliers, outlier_validation=outlier_validation), dropped


def at_most(images: ImageSet, limit: int, generator: np.random.Generator) -> ImageSet:
    """`limit` images drawn at random, in their order; all where there are no more, or `limit` is 0."""
    if not 0 < limit < len(images):
        return images
    chosen: Tensor = torch.from_numpy(np.sort(generator.permutation(len(images))[:limit]))
    return images.select(chosen)
