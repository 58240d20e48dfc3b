"""What a data set for OOD detection consists of, and how the classes of a labelled set become one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkern.data.images import ImageSet


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
    dropped: int = 0  # images that stood in two parts and were left out of one
    # Of outliers and OOD sets, by source: classes that bear the name of an ID class; and how many their images were,
    # which were left out.
    namesakes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    namesake_images: int = 0
    mixed: int = 0  # images of a multi-label set that show known and held-out classes, left out too
    resize: str = "stretch"  # how image files are, see DataConfig

    @property
    def shared_classes(self) -> tuple[str, ...]:
        """Names of ID classes that outliers or an OOD set had too."""
        return tuple(sorted({name for names in self.namesakes.values() for name in names}))

    @property
    def left_out(self) -> dict[str, int]:
        """Images that are in no part, by the reason."""
        found = {
            "being in two parts": self.dropped,
            f"of {len(self.shared_classes):,} classes that the ID set has too": self.namesake_images,
            "showing known and held-out classes": self.mixed,
        }
        return {reason: count for reason, count in found.items() if count}

    def describe(self) -> str:
        ood = ", ".join(f"{len(images):,} {name}" for name, images in self.test_ood.items())
        kind = "labels" if self.multi_label else "classes"
        dropped = "".join(f"; left out, {reason}: {count:,}" for reason, count in self.left_out.items())
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.validation):,} validation and {len(self.test):,} "
            f"test images of {len(self.classes)} {kind}; {len(self.outliers):,} outliers to train with and "
            f"{len(self.outlier_validation):,} to validate; test OOD {ood}{dropped}"
        )

    def facts(self) -> dict[str, Any]:
        """What tells these training images from others without a look at each: classes, shape, numbers."""
        parts = ("train", "validation", "outliers", "outlier_validation")
        images = {name: len(getattr(self, name)) for name in parts}
        return {"classes": list(self.classes), "shape": list(self.train.shape), "images": images}


class ClassSplit(NamedTuple):
    """Which classes are known, which are outliers, which are the OOD of the test."""

    known: tuple[int, ...]
    outliers: tuple[int, ...]
    ood: tuple[int, ...]


def generator_of(split: int | None, purpose: int) -> np.random.Generator:
    """Random numbers of a split (None: the fixed one), a sequence for each purpose."""
    # The second word of the counter keeps these draws apart from those of the streams, whatever their keys.
    key = [0 if split is None else split + 1, purpose]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 1, 0, 0]))


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
    """The images of some classes, renumbered 0, 1, ... in the order given.

    Of a multi-label set they are the images whose labels are all among these classes, one at least.
    """
    names = [images.classes[c] for c in classes]
    if images.labels.dim() == 2:
        chosen = images.labels[:, list(classes)]
        indices = (chosen.any(1) & (chosen.sum(1) == images.labels.sum(1))).nonzero().flatten()
        return images.select(indices).relabelled(chosen[indices], names)
    number = torch.full((max(len(images.classes), 1),), -1)
    number[list(classes)] = torch.arange(len(classes))
    known = images.labels >= 0
    labels = torch.where(known, number[images.labels.clamp_min(0)], -1)
    indices = (labels >= 0).nonzero().flatten()
    return images.select(indices).relabelled(labels[indices], names)


def mixed_images(images: ImageSet, groups: Sequence[Sequence[int]]) -> int:
    """How many images of a multi-label set show a class of one of the groups beside one that is not in that group."""
    if images.labels.dim() == 1:
        return 0
    inside = torch.stack([images.labels[:, list(group)].sum(1) for group in groups])
    return int(((inside > 0) & (inside < images.labels.sum(1))).any(0).sum())


def word(name: str) -> str:
    """A class's name without case and what stands between its words: "dining table", diningtable. "" of a number."""
    letters = re.sub(r"[\W_]+", "", name).casefold()
    return "" if letters.isdecimal() else letters


def without_known_classes(images: ImageSet, classes: Sequence[str]) -> tuple[ImageSet, tuple[str, ...]]:
    """The images less those of the classes that bear the name of one of `classes`; and the names of the former.

    Numbers are no names: the class 3 of one set is not that of another.
    """
    known = {word(name) for name in classes} - {""}
    shared = [k for k, name in enumerate(images.classes) if word(name) in known]
    if not shared:
        return images, ()
    labels = images.labels
    theirs = labels[:, shared].any(1) if labels.dim() == 2 else torch.isin(labels, torch.tensor(shared))
    return images.select((~theirs).nonzero().flatten()), tuple(images.classes[k] for k in shared)


def hold_out(images: ImageSet, share: float, generator: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    """Two parts, the second with `share` of each class: rounded, one image at least where the class has two."""
    labels = images.labels.numpy() if images.labels.dim() == 1 else np.zeros(len(images), dtype=np.int64)
    held = np.zeros(len(images), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: min(max(round(share * len(members)), 1), len(members) - 1)]] = True
    return images.select(torch.from_numpy(np.flatnonzero(~held))), images.select(torch.from_numpy(np.flatnonzero(held)))


def digests(images: ImageSet) -> Iterable[Any]:
    """What tells images apart: the pixels of those in memory, the path of a file, the place in a shard."""
    return images.identities()


def unseen(images: ImageSet, seen: set[Any]) -> ImageSet:
    """The images that are not among those seen."""
    fresh = np.fromiter((digest not in seen for digest in digests(images)), dtype=bool)
    if len(fresh) < len(images) or fresh.all():  # what tells them apart is not known, or none was seen
        return images
    return images.select(torch.from_numpy(np.flatnonzero(fresh)))


def seen_in(*parts: ImageSet) -> set[Any]:
    return {digest for part in parts for digest in digests(part)}


def without_shared_images(split: OODSplit) -> OODSplit:
    """The split less the test OOD images that are ID images, and less the outliers that are ID or test images.

    Images in memory are compared by their pixels (three images of CIFAR-100 are in CIFAR-10), files by their paths.
    The training and the test part of the ID set are taken as they are.
    """
    known = seen_in(split.train, split.validation, split.test)
    ood = {name: unseen(images, known) for name, images in split.test_ood.items()}
    seen = known | seen_in(*ood.values())
    outliers, outlier_validation = unseen(split.outliers, seen), unseen(split.outlier_validation, seen)
    before = [*split.test_ood.values(), split.outliers, split.outlier_validation]
    dropped = sum(map(len, before)) - sum(map(len, [*ood.values(), outliers, outlier_validation]))
    return replace(
        split, test_ood=ood, outliers=outliers, outlier_validation=outlier_validation, dropped=split.dropped + dropped
    )


def at_most(images: ImageSet, limit: int, generator: np.random.Generator) -> ImageSet:
    """`limit` images drawn at random, in their order; all where there are no more, or `limit` is 0."""
    if not 0 < limit < len(images):
        return images
    chosen: Tensor = torch.from_numpy(np.sort(generator.permutation(len(images))[:limit]))
    return images.select(chosen)
