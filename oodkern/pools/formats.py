"""Features [N, D] in files: NumPy's .npy and safetensors, mapped into memory; Arrow's are in `oodkern.pools.arrow`.

.npy: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. safetensors: 8 bytes, little-endian, with
the length of a JSON header, which has dtype, shape and first and last byte of each tensor; then the bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.pools.blocks import Block, mapped
from oodkern.pools.manifest import PoolError, regular, shown

NPY = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "<u2": torch.uint16}
SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
HEADER_LIMIT = 100 << 20  # bytes of a safetensors header, as its own library has it
SUFFIXES = (".npy", ".safetensors", ".parquet", ".arrow", ".feather")


class Features(NamedTuple):
    """Of a plain file."""

    block: Block
    dimension: int
    dtype: torch.dtype


class Header(NamedTuple):
    """Of a .npy file: dtype as PyTorch has it, shape, and the byte where the numbers begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def npy_header(path: Path) -> Header:
    """Raises PoolError, also where the file is shorter or longer than its header says."""
    try:
        with open(regular(path), "rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0), (3, 0)):
                number = ".".join(map(str, version))
                raise PoolError(f"{path}: not a readable .npy file (version {number} of the format)")
            # 3.0 is 2.0 with UTF-8 instead of Latin-1, and a header of plain numbers is ASCII.
            read: Any = getattr(np.lib.format, f"read_array_header_{min(version[0], 2)}_0")
            shape, fortran, dtype = read(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or brief(error)}") from None
    except PoolError:
        raise
    except Exception:  # a damaged header raises whatever its text happens to mean
        raise PoolError(f"{path}: not a readable .npy file (its header is damaged)") from None
    if not all(type(length) is int and length >= 0 for length in shape):
        raise PoolError(f"{path}: not a readable .npy file (its header is damaged)")
    if dtype.str not in NPY:
        raise PoolError(f"{path}: expected float16, float32 or float64, little-endian, got {dtype}")
    if fortran and len(shape) > 1 and min(shape) > 1:
        raise PoolError(f"{path}: expected rows one after another, in C order, got Fortran order")
    found = Header(NPY[dtype.str], shape, offset)
    check_size(path, size, offset + math.prod(shape) * dtype.itemsize)
    return found


def check_size(path: Path, size: int, expected: int) -> None:
    if size < expected:
        raise PoolError(f"{path}: truncated: expected {expected:,} bytes, got {size:,}")
    if size > expected:
        raise PoolError(f"{path}: longer than it should be: expected {expected:,} bytes, got {size:,}")


def check_shape(path: Path, shape: tuple[int, ...], what: str = "") -> tuple[int, int]:
    """The shape of features: [N, D], both positive. Raises PoolError."""
    if len(shape) != 2 or min(shape) < 1:
        raise PoolError(f"{path}: {what}expected features [N, D], both positive, got {list(shape)}")
    return shape[0], shape[1]


def open_npy(path: Path, dtype: str | None) -> Features:
    header = npy_header(path)
    found = header.dtype
    if found == torch.uint16:
        if dtype != "bfloat16":
            raise PoolError(
                f'{path}: expected floating-point numbers, got uint16; dtype="bfloat16" says it holds these'
            )
        found = torch.bfloat16
    shape = check_shape(path, header.shape)
    return Features(mapped(path, header.offset, shape, found), shape[1], found)


class Stored(NamedTuple):
    """A tensor of a safetensors file: its dtype as the file names it, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def safetensors_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file. Raises PoolError where the header is none, or the file shorter or longer than it says."""
    try:
        with open(regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise PoolError(f"{path}: not a readable .safetensors file (no header)")
            content = json.loads(file.read(length))
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or brief(error)}") from None
    except (ValueError, RecursionError) as error:
        raise PoolError(f"{path}: not a readable .safetensors file ({brief(error)})") from None
    if not isinstance(content, dict):
        raise PoolError(f"{path}: not a readable .safetensors file (the header is no object)")
    content.pop("__metadata__", None)
    found = {name: stored(path, name, one, 8 + length) for name, one in content.items()}
    check_size(path, size, max((one.stop for one in found.values()), default=8 + length))
    return found


def stored(path: Path, name: str, content: Any, offset: int) -> Stored:
    """An entry of the header. Its bytes are as many as its shape needs where its dtype is one of ours."""
    try:
        dtype, shape, (start, stop) = content["dtype"], content["shape"], content["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)) or stop < start:
            raise ValueError
        if dtype in SAFETENSORS and stop - start != math.prod(shape) * SAFETENSORS[dtype].itemsize:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise PoolError(f"{path}: {shown(name)}: expected dtype, shape and data_offsets that agree") from None
    return Stored(str(dtype), tuple(shape), offset + start, offset + stop)


def open_safetensors(path: Path, name: str | None) -> Features:
    """The tensor of a name, by default the only one with two dimensions. Raises PoolError."""
    there = safetensors_header(path)
    if name is None:
        matrices = [one for one, entry in there.items() if len(entry.shape) == 2]
        if len(matrices) != 1:
            raise PoolError(f"{path}: expected one tensor [N, D], or its name, got {listed(matrices)}")
        name = matrices[0]
    if name not in there:
        raise PoolError(f"{path}: expected a tensor {name!r}, got {listed(list(there))}")
    entry = there[name]
    if entry.dtype not in SAFETENSORS:
        raise PoolError(f"{path}: {name}: expected one of {', '.join(SAFETENSORS)}, got {entry.dtype}")
    shape, kind = check_shape(path, entry.shape, f"{name}: "), SAFETENSORS[entry.dtype]
    return Features(mapped(path, entry.start, shape, kind), shape[1], kind)


def listed(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else "none"


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file of tensors of the four dtypes. Its header ends at a multiple of 64 bytes."""
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    entries, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(content)],
        }
        parts.append(content)
        at += len(content)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % 64)
    return struct.pack("<Q", len(header)) + header + b"".join(parts)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small file, in memory. Raises PoolError."""
    header, found = safetensors_header(path), {}
    content = path.read_bytes()
    for name, entry in header.items():
        if entry.dtype not in SAFETENSORS:
            raise PoolError(f"{path}: {name}: expected one of {', '.join(SAFETENSORS)}, got {entry.dtype}")
        values = torch.frombuffer(bytearray(content[entry.start : entry.stop]), dtype=torch.uint8)
        found[name] = values.view(SAFETENSORS[entry.dtype]).view(entry.shape)
    return found
