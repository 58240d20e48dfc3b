"""The embedded data set: scikit-learn's handwritten digits and its two photographs. Real images, no download."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodkern.data.split import OODSplit

ID_CLASSES, OUTLIER_CLASSES, NEAR_CLASSES = (0, 1, 2, 3, 4, 5), (6, 7), (8, 9)
TEST_SHARE = 0.3
FAR_PATCHES = 360
PATCH, SHRINK = 8, 4


def load_digits(seed: int = 0) -> OODSplit:
    """Digits 0-5 as ID (1,083 images of 8x8), 6-7 as outliers, 8-9 as near OOD, patches of photographs as far OOD.

    The split of the ID images into training and test is stratified and depends on `seed`; no image is in two
    parts. Pixels are in [0, 1]. Far patches are 8x8 grey crops of the photographs, shrunk four times.
    """
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images, labels = digits.images / 16.0, digits.target
    generator = np.random.default_rng(seed)

    test = np.zeros(len(labels), dtype=bool)
    for label in ID_CLASSES:
        members = generator.permutation(np.flatnonzero(labels == label))
        test[members[: round(TEST_SHARE * len(members))]] = True
    known = np.isin(labels, ID_CLASSES)

    return OODSplit(
        name="digits",
        train_images=as_images(images[known & ~test]),
        train_labels=torch.from_numpy(labels[known & ~test]).long(),
        test_images=as_images(images[known & test]),
        test_labels=torch.from_numpy(labels[known & test]).long(),
        outliers=as_images(images[np.isin(labels, OUTLIER_CLASSES)]),
        test_ood={
            "near": as_images(images[np.isin(labels, NEAR_CLASSES)]),
            "far": as_images(photo_patches(FAR_PATCHES, generator)),
        },
        num_classes=len(ID_CLASSES),
    )


def photo_patches(count: int, generator: np.random.Generator) -> NDArray:
    """Random 8x8 grey crops [count, 8, 8] of scikit-learn's photographs, in [0, 1]."""
    import sklearn.datasets

    photos = []
    for photo in sklearn.datasets.load_sample_images().images:
        grey = photo.mean(-1) / 255.0
        height, width = (side // SHRINK * SHRINK for side in grey.shape)
        cells = grey[:height, :width].reshape(height // SHRINK, SHRINK, width // SHRINK, SHRINK)
        photos.append(cells.mean((1, 3)))
    patches = []
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = (int(generator.integers(side - PATCH + 1)) for side in photo.shape)
        patches.append(photo[top : top + PATCH, left : left + PATCH])
    return np.stack(patches)


def as_images(images: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1)
