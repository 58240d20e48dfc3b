"""SVHN's cropped digits: train_32x32.mat and test_32x32.mat (http://ufldl.stanford.edu/housenumbers)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from oodkern._errors import brief
from oodkern.data.images import ArraySet, DataError, ImageSet

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


def read_svhn(folder: Path) -> Mapping[str, ImageSet]:
    """The parts train and test of [N, 3, 32, 32] uint8; one that is alone is the whole set. Label 10 is the digit 0.

    The 531,131 images of extra_32x32.mat are not read.

    Raises DataError naming the file.
    """
    names = [str(digit) for digit in range(10)]
    parts: dict[str, ImageSet] = {}
    for part, name in FILES.items():
        if (folder / name).is_file():
            images, labels = read_matlab(folder / name)
            parts[part] = ArraySet(torch.from_numpy(images), torch.from_numpy(labels), names)
    if not parts:
        raise DataError(f"{folder}: expected {' and '.join(FILES.values())}, found neither")
    return parts if len(parts) == 2 else {"all": next(iter(parts.values()))}


def read_matlab(path: Path) -> tuple[NDArray, NDArray]:
    """Images [N, 3, 32, 32] and digits [N] of a MATLAB 5 file with X [32, 32, 3, N] uint8 and y [N, 1] in 1..10."""
    from scipy.io import loadmat  # scipy comes with scikit-learn

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file raises whatever its bytes happen to spell
        raise DataError(f"{path}: not a readable MATLAB 5 file ({brief(error)})") from None
    for name in ("X", "y"):
        if name not in content:
            raise DataError(f"{path}: expected the variables X and y, found no {name}")
    images, labels = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise DataError(f"{path}: expected X [32, 32, 3, N] of uint8, got {list(images.shape)} of {images.dtype}")
    if len(labels) != images.shape[3]:
        raise DataError(f"{path}: expected y [{images.shape[3]}, 1], a label for each image, got {len(labels)}")
    if labels.dtype.kind not in "uif" or not np.isin(labels, np.arange(1, 11)).all():
        raise DataError(f"{path}: expected labels 1 to 10 in y, got others")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10
