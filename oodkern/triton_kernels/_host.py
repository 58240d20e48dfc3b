"""What host functions share: operands, grids, waves of rows, launches, and the products that follow a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from oodkern.backends import arch_of
from oodkern.triton_kernels._product_kernel import product_kernel
from oodkern.triton_kernels.configs import Tile, config

# What fits into half of the L2 cache of an H200: a wave's slopes are read from there by the products that follow.
CACHE = 30 << 20
# Rows are few enough for that unless they must fill a wave of the GPU; never more than this.
WORKSPACE = 256 << 20
INTERPRETED_PROCESSORS = 2


def processors(device: torch.device) -> int:
    """How many programs run at once; under the interpreter few, so that every program walks over several tiles."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_dense(matrix: Tensor) -> Tensor:
    """The matrix as kernels take it: a last stride of 1, and row strides that a tile multiplies in 32 bits."""
    if (matrix.shape[1] > 1 and matrix.stride(1) != 1) or matrix.stride(0) >= 1 << 22:
        return matrix.contiguous()
    return matrix


def describable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read the matrix: 16-byte alignment of its base and of its rows."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0
    return aligned and matrix.stride(1) == 1 and 0 < matrix.shape[1] <= matrix.stride(0) and len(matrix) > 0


def tile_for(kernel: str, features: Tensor, K: int, *matrices: Tensor | None) -> Tile:
    """The tile for a kernel, with descriptors only where all of `matrices` can be described."""
    descriptors = len(matrices) > 0 and all(matrix is None or describable(matrix) for matrix in matrices)
    return config(kernel, features.dtype, K, arch_of(features.device), descriptors)


def operand(matrix: Tensor | None, rows: int, tile: Tile) -> Any:
    """A matrix as a kernel's argument: itself, or a descriptor of its tiles [rows, tile.depth]."""
    if matrix is None or not tile.descriptors:
        return matrix
    return TensorDescriptor.from_tensor(matrix, [rows, tile.depth])


def split_columns(row_tiles: int, K: int, columns: int, programs: int = 264) -> tuple[int, int]:
    """(splits, columns of a split): as many splits as bring row tiles x splits to about `programs`.

    264 is two waves of the 132 multiprocessors of an H200. Splits are whole tiles, and none is empty.
    """
    tiles = max(triton.cdiv(K, columns), 1)
    splits = max(1, min(tiles, programs // max(row_tiles, 1)))
    share = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, share), share * columns


def waves(N: int, row_bytes: int, rows: int = 0) -> Iterator[tuple[int, int]]:
    """(begin, end) of waves of rows whose workspace stays in the L2 cache, but of at least `rows` rows.

    `row_bytes` is the workspace of a row; waves are whole multiples of 128 rows.
    """
    most = min(max(CACHE // max(row_bytes, 1), rows), WORKSPACE // max(row_bytes, 1))
    size = max(most // 128, 1) * 128
    for begin in range(0, N, size):
        yield begin, min(begin + size, N)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor; a grid without programs is nothing to do.

    Multiplications and additions are contracted, whatever the Triton at hand takes as its default.
    """
    if 0 in grid:
        return
    tensors = (x.base if isinstance(x, TensorDescriptor) else x for x in arguments)
    device = next(x.device for x in tensors if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def power_of_two(magnitudes: Tensor, largest: int = 14) -> Tensor:
    """A power of two, as a float32 tensor without dimensions, that brings the largest finite magnitude to [2^14, 2^15).

    float16 ends at 6.5e4 and has 10 bits down to 6e-5: with a mean over 10^7 rows, gradients of logits lie below
    that. Exact, and nothing waits for the GPU.
    """
    finite = torch.where(magnitudes.isfinite(), magnitudes, 0.0)
    top = finite.amax() if finite.numel() else finite.new_zeros(())
    # The exponent alone, and no less than 2^-100, whose reciprocal times 2^14 is finite.
    floor = (top.float().view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**-100)
    return 2.0**largest / floor


def exact_float32() -> bool:
    """Whether float32 products of cuBLAS are that, and not TF32."""
    return torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, added in float32: as float32, or into `out`, rounded once to its dtype."""
    if left.device.type != "cuda":  # under the interpreter, where products of 16-bit numbers may be added in 16 bits
        result = torch.mm(left.float(), right.float())
    elif left.dtype == torch.float32:
        if exact_float32():
            return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
        result = full_product(left, right)
    elif out is not None and out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    else:
        result = torch.mm(left, right, out_dtype=torch.float32)
    return result if out is None else out.copy_(result)


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: Tensor | None = None) -> None:
    """total += factor * (left @ right), for float32 `total` and a `factor` without dimensions."""
    if factor is not None:
        total.addcmul_(product(left, right), factor)
    elif left.device.type != "cuda":
        total.addmm_(left.float(), right.float())
    elif left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif exact_float32():
        total.addmm_(left, right)
    else:
        total.add_(full_product(left, right))


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 proper where cuBLAS has been told to use TF32: no one else's setting is changed."""
    (M, inner), N = left.shape, right.shape[1]
    out = left.new_empty((M, N))
    tile = config("product", torch.float32, N, arch_of(left.device))
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.classes),)
    sizes = (*left.stride(), *right.stride(), M, N, inner)
    launch(product_kernel, grid, left, right, out, *sizes, **tile.constants(descriptors=False))
    return out
