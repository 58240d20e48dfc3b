"""Images in one array of NumPy's format (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from oodkern._errors import brief
from oodkern.data.images import UNKNOWN, ArraySet, DataError, ImageSet


def read_array(path: Path) -> Mapping[str, ImageSet]:
    """All images of a .npy file, unlabelled: uint8 [N, H, W, 3] in RGB, [N, H, W, 1] or [N, H, W].

    The file is mapped into memory and read where images are taken. Raises DataError with the path for another file.
    """
    try:
        # Copy on write: PyTorch has no tensors that are read-only. An array of objects, a pickle, is refused.
        array: NDArray = np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or brief(error)}") from None
    except Exception as error:  # a damaged header raises whatever its text happens to mean
        raise DataError(f"{path}: not a readable .npy file of numbers ({brief(error)})") from None
    if array.dtype != np.uint8:
        raise DataError(f"{path}: expected uint8, got {array.dtype}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise DataError(f"{path}: expected images [N, H, W, 3], [N, H, W, 1] or [N, H, W], got {list(array.shape)}")
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    return {"all": ArraySet(images, torch.full((len(images),), UNKNOWN))}
