"""Pieces of files as tensors: mapped into memory, or read on demand where their numbers are packed."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.pools.manifest import PoolError


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Block(Protocol):
    """Features [rows, D] of a piece of a file."""

    rows: int

    def slice(self, start: int, stop: int) -> Tensor: ...  # a view where the file allows one

    def take(self, indices: Tensor) -> Tensor: ...  # a copy


class Whole:
    """A block that is a tensor, of memory or of a file that is mapped into it."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.rows = features, len(features)

    def slice(self, start: int, stop: int) -> Tensor:
        return self.features[start:stop]

    def take(self, indices: Tensor) -> Tensor:
        return self.features[indices]


class Unaligned:
    """A block whose numbers lie at bytes that are no multiple of their size, where a tensor cannot."""

    def __init__(self, content: Tensor, dtype: torch.dtype) -> None:
        self.content, self.dtype, self.rows = content, dtype, len(content)

    def slice(self, start: int, stop: int) -> Tensor:
        return self.content[start:stop].clone().view(self.dtype)

    def take(self, indices: Tensor) -> Tensor:
        return self.content[indices].view(self.dtype)


class Loader:
    """Reads blocks on demand and keeps the last one alone."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self.read = read
        self.last: tuple[int, Tensor] | None = None  # one value, which threads see whole

    def block(self, number: int) -> Tensor:
        last = self.last
        if last is None or last[0] != number:
            last = self.last = None  # gone before another comes
            last = self.last = number, self.read(number)
        return last[1]


class Loaded:
    """Block `number` of a file whose numbers are packed: as a tensor in memory while it is read.

    Slices are copies: a view that is still worked on would keep the whole block beside the next one.
    """

    def __init__(self, loader: Loader, number: int, rows: int) -> None:
        self.loader, self.number, self.rows = loader, number, rows

    def slice(self, start: int, stop: int) -> Tensor:
        return self.loader.block(self.number)[start:stop].clone()

    def take(self, indices: Tensor) -> Tensor:
        return self.loader.block(self.number)[indices]


def mapped(path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Block:
    """The block [N, D] that lies at a byte of a file, which is as long as that needs.

    The map is copy-on-write: PyTorch has no read-only tensors, and a write to one would end the process. Reading copies
    nothing. PyTorch's own map keeps no file descriptor, of which 1,024 are a usual limit; but the kernel refuses a
    copy-on-write map larger than its memory, and there it is a read-only one.
    """
    rows, dimension = shape
    if not rows:
        return Whole(torch.empty(shape, dtype=dtype))
    size = rows * dimension * dtype.itemsize
    try:
        content = torch.from_file(os.fspath(path), shared=False, size=offset + size, dtype=torch.uint8)
    except RuntimeError:
        content = read_only(path, offset + size)
    content = content[offset:].view(rows, -1)
    return Unaligned(content, dtype) if offset % dtype.itemsize else Whole(content.view(dtype))


def read_only(path: Path, size: int) -> Tensor:
    try:
        with open(path, "rb") as file:
            content = np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise PoolError(f"{path}: cannot be mapped into memory ({brief(error)})") from None
    return from_read_only(content)


def from_read_only(array: np.ndarray) -> Tensor:
    """The tensor of an array that nobody writes to, without the warning of PyTorch, which has no read-only tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)
