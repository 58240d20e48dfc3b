"""The embedded images: scikit-learn's handwritten digits and its two photographs. Real images, no download."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkern.data.images import ArraySet, ImageSet
from oodkern.data.split import OODSplit, generator_of

FAR_PATCHES = 360
SHRINK = 4
CELLS, CELL = 2, 10  # a canvas is 2 x 2 cells of 10 x 10 pixels, with a digit of 8 x 8 somewhere in a cell
IMBALANCE = 20.0  # how much likelier the first label of a canvas is than the last
CANVASES_PER_DIGIT = 2


def read_digits() -> ArraySet:
    """The 1,797 digits, [N, 1, 8, 8] float32 in [0, 1], labelled 0..9."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    return ArraySet(
        as_images(digits.images / 16.0), torch.from_numpy(digits.target).long(), [str(i) for i in range(10)]
    )


def photo_patches(count: int, channels: int, size: int, split: int | None) -> ArraySet:
    """Random crops [count, channels, size, size] of scikit-learn's photographs, in [0, 1], as outliers.

    The photographs are shrunk four times first (to 160 x 106 pixels), so that a crop of 8 pixels shows something;
    for crops of 64 pixels and more less, so that they fit.
    """
    import sklearn.datasets

    photos = []
    for photo in sklearn.datasets.load_sample_images().images:
        shrink = max(min(SHRINK, min(photo.shape[:2]) // size), 1)
        height, width = (side // shrink * shrink for side in photo.shape[:2])
        cells = photo[:height, :width].reshape(height // shrink, shrink, width // shrink, shrink, 3)
        colour = cells.mean((1, 3)) / 255.0
        photos.append(colour if channels == 3 else colour.mean(-1, keepdims=True).repeat(channels, -1))
    if size > min(photos[0].shape[:2]):
        raise ValueError(f"photos: have patches of at most {min(photos[0].shape[:2])} pixels, got a size of {size}")
    generator, patches = generator_of(split, 1), []
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (int(generator.integers(side - size + 1)) for side in photo.shape[:2])
        patches.append(photo[top : top + size, left : left + size])
    images = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).float().contiguous()
    return ArraySet(images, torch.full((count,), -1))


def compose(digits: ImageSet, multi_label: bool, generator: np.random.Generator) -> ArraySet:
    """Canvases [M, 1, 20, 20] of one to four digits of a set, two for every digit.

    Labels are drawn with a long tail: the first class is twenty times as likely as the last, in geometric steps.
    With `multi_label` labels are [M, K], 1 for every class that is on the canvas; otherwise the canvases are outliers.
    """
    images = digits.images(torch.arange(len(digits))).numpy()[:, 0]
    labels = digits.labels.numpy()
    K, side = len(digits.classes) if multi_label else 1, CELLS * CELL
    groups = [np.flatnonzero(labels == label) for label in range(K)] if multi_label else [np.arange(len(labels))]
    weights = IMBALANCE ** -(np.arange(K) / max(K - 1, 1)) * [len(group) > 0 for group in groups]
    weights /= weights.sum()
    count = CANVASES_PER_DIGIT * len(images)
    canvases, present = np.zeros((count, side, side)), np.zeros((count, K))
    for canvas, row in zip(canvases, present, strict=True):
        cells = generator.permutation(CELLS * CELLS)[: generator.integers(1, CELLS * CELLS + 1)]
        for cell in cells:
            label = generator.choice(K, p=weights)
            top, left = (CELL * at + generator.integers(CELL - 8 + 1) for at in divmod(int(cell), CELLS))
            canvas[top : top + 8, left : left + 8] = images[generator.choice(groups[label])]
            row[label] = 1
    found = torch.from_numpy(present).float() if multi_label else torch.full((count,), -1)
    return ArraySet(as_images(canvases), found, digits.classes if multi_label else ())


def as_canvases(split: OODSplit, number: int | None) -> OODSplit:
    """The multi-label set: canvases composed of the digits of each part, so that no digit is in two parts either."""
    generator = generator_of(number, 2)
    return replace(
        split,
        name="digits-multilabel",
        multi_label=True,
        train=compose(split.train, True, generator),
        validation=compose(split.validation, True, generator),
        test=compose(split.test, True, generator),
        outliers=compose(split.outliers, False, generator),
        outlier_validation=compose(split.outlier_validation, False, generator),
        test_ood={name: compose(images, False, generator) for name, images in split.test_ood.items()},
    )


def as_images(images: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1)
