"""Banks of synthetic outliers on disk: a matrix in a .npy or a .safetensors file."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern._files import write_bytes
from oodkern.data import DataError
from oodkern.ops._product import check_matrix

KEY = "latents"
FORMATS = (".npy", ".safetensors")
CHANNELS = 4  # of the latents of Stable Diffusion


def as_vectors(latents: Tensor) -> Tensor:
    """Latents [M, d] as they are, [M, h, w] averaged over height, [M, c, h, w] over channels, then height: [M, w]."""
    while latents.dim() > 2:
        latents = latents.mean(1)
    return latents


def read_bank(path: str | Path) -> Tensor:
    """The outliers of a bank, [M, d] float32 on the CPU.

    Args:
        path: a .npy file, or a .safetensors file, of which the tensor "latents" is taken, else the first matrix in
            the order of the names, else the only tensor. Floating; [M, d], or latents of a diffusion model, square
            ones, which are averaged as OAL's trainer does: [M, 4, h, h] over channels, then over height, [M, h, h]
            over height, to [M, h]. OAL's released banks have other shapes and are to be reshaped: that of diffusion,
            [100, 3, 64, 64], of 100 iterations of 3 latents that are averaged over channels already, to
            [300, 64, 64]; that of boundaries, [classes, m, d], to [classes * m, d].

    Raises DataError, which names the file: no such file, another format, pickled objects (never unpickled), another
    shape, no rows, numbers that are NaN or infinite (in float32); ImportError where .safetensors is not installed.
    """
    path = Path(path)
    _format(path)
    try:
        path.open("rb").close()  # whose error names the reason in either format
        latents = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or brief(error)}") from None
    if not latents.is_floating_point():
        raise DataError(f"{path}: expected floating numbers, got {str(latents.dtype).removeprefix('torch.')}")
    shape = tuple(latents.shape)
    of_image = ((shape[-1], shape[-1]), (CHANNELS, shape[-1], shape[-1])) if shape else ()
    if 0 in shape or not (len(shape) == 2 or shape[1:] in of_image):
        raise DataError(
            f"{path}: expected outliers [M, d], or latents [M, h, h] or [M, {CHANNELS}, h, h], got {list(shape)} "
            "(released banks: reshape [100, 3, 64, 64] to [300, 64, 64], [classes, m, d] to [classes * m, d])"
        )
    vectors = as_vectors(latents.float())
    bad = len(vectors) - int(vectors.isfinite().all(1).sum())
    if bad:
        raise DataError(f"{path}: expected finite numbers, got NaN or infinity in {bad:,} of {len(vectors):,} outliers")
    return vectors


def write_bank(path: str | Path, latents: Tensor) -> None:
    """Writes outliers [M, d] to a .npy or a .safetensors file, float32, under a temporary name and then renamed.

    Raises TypeError or ValueError for anything but finite floating [M, d] with M, d > 0, DataError for another format,
    ImportError where .safetensors is not installed, OSError where nothing can be written.
    """

    path = Path(path)
    _format(path)
    check_matrix(latents, "latents", "M, d")
    rows = latents.detach().float().cpu().contiguous()
    if 0 in rows.shape or not rows.isfinite().all():
        raise ValueError(f"latents: expected finite numbers [M, d] with M, d > 0, got {list(rows.shape)} or others")
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, rows.numpy(), allow_pickle=False)
        write_bytes(path, buffer.getvalue())
    else:
        write_bytes(path, _safetensors().torch.save({KEY: rows}))


def _format(path: Path) -> None:
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: expected a file of {' or '.join(FORMATS)}, got {path.suffix or 'no ending'}")


def _read_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: expected a .npy file of numbers, which holds no Python objects ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{path}: expected one array of floating numbers, got {kind}")
    # Own memory in the byte order of this machine, which PyTorch asks for.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _read_safetensors(path: Path) -> Tensor:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            matrices = [name for name, shape in shapes.items() if len(shape) == 2]
            chosen = KEY if KEY in shapes else next(iter(matrices), None)
            if chosen is None and len(shapes) == 1:
                chosen = next(iter(shapes))
            if chosen is None:
                raise DataError(f"{path}: expected a tensor {KEY!r}, a matrix or one tensor alone, got {shapes}")
            return file.get_tensor(chosen)
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: damaged .safetensors file ({error})") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(".safetensors files need safetensors: pip install 'oodkern[synthesis]'") from None
    module: ModuleType = safetensors
    return module
