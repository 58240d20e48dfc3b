"""Kernels that walk the rows of one or two matrices: dot products, reciprocal norms, scaling, tangents of the sphere.

Every row belongs to one program; its columns are a loop inside. All of them are bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oodkern.triton_kernels._host import launch


@triton.jit
def row_dot_kernel(
    a_ptr,  # [N, D]
    b_ptr,  # [N, D]
    out_ptr,  # [N] float32: FACTOR a . b, or the reciprocal of its root, 0 where that is 0
    N,
    D,
    a_stride,
    b_stride,
    FACTOR: tl.constexpr,
    RECIPROCAL_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows = a_ptr + rows[:, None] * a_stride
    b_rows = b_ptr + rows[:, None] * b_stride
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        a = tl.load(a_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += a * b
    total = tl.sum(sums, 1)
    if RECIPROCAL_NORM:
        # NaN is not equal to 0 and stays NaN.
        empty = total == 0.0
        total = tl.where(empty, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(empty, 1.0, total))))
    tl.store(out_ptr + rows, total * FACTOR, mask=rows < N)


@triton.jit
def scale_rows_kernel(
    x_ptr,  # [N, D]
    factor_ptr,  # [N] float32
    out_ptr,  # [N, D]: factor x, rounded once
    N,
    D,
    x_stride,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(factor_ptr + rows, mask=rows < N, other=0.0)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        out = (factor[:, None] * x).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out, mask=inside)


@triton.jit
def gradient_rows_kernel(
    v_ptr,  # [N, D] float32: the gradient in the row of norm 1, or in the row itself
    x_ptr,  # [N, D]; not read unless TANGENT
    reciprocal_ptr,  # [N] float32: 1 / |x|, 0 for a row of zeros; not read unless TANGENT
    factor_ptr,  # [N] float32
    out_ptr,  # [N, D]: factor v, of it the part that is orthogonal to x where TANGENT
    N,
    D,
    v_stride,
    x_stride,
    out_stride,
    TANGENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(factor_ptr + rows, mask=rows < N, other=0.0)
    v_rows = v_ptr + rows[:, None] * v_stride
    x_rows = x_ptr + rows[:, None] * x_stride
    if TANGENT:
        reciprocal = tl.load(reciprocal_ptr + rows, mask=rows < N, other=0.0)
        sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = (rows < N)[:, None] & (columns < D)[None, :]
            v = tl.load(v_rows + columns[None, :], mask=inside, other=0.0)
            x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            sums += v * (x * reciprocal[:, None])
        radial = tl.sum(sums, 1)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        v = tl.load(v_rows + columns[None, :], mask=inside, other=0.0)
        if TANGENT:
            x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            v -= radial[:, None] * (x * reciprocal[:, None])
        out = (factor[:, None] * v).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out, mask=inside)


def row_blocks(D: int) -> dict[str, int]:
    """BLOCK_N and BLOCK_D of the kernels above: 2,048 numbers a program, 16 a thread."""
    columns = min(max(triton.next_power_of_2(D), 16), 1024)
    return {"BLOCK_N": 2048 // columns, "BLOCK_D": columns}


def _launch_rows(kernel: triton.JITFunction, x: Tensor, *arguments: object, **constants: object) -> None:
    N, D = x.shape
    blocks = row_blocks(D)
    launch(kernel, (triton.cdiv(N, blocks["BLOCK_N"]),), *arguments, **constants, **blocks, num_warps=4)


def row_dot(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor a . b of each pair of rows, [N] float32."""
    out = a.new_empty(len(a), dtype=torch.float32)
    _launch_rows(row_dot_kernel, a, a, b, out, *a.shape, a.stride(0), b.stride(0), FACTOR=factor, RECIPROCAL_NORM=False)
    return out


def reciprocal_norms(x: Tensor) -> Tensor:
    """1 / |x| of each row, 0 for a row of zeros, [N] float32."""
    out = x.new_empty(len(x), dtype=torch.float32)
    _launch_rows(row_dot_kernel, x, x, x, out, *x.shape, x.stride(0), x.stride(0), FACTOR=1.0, RECIPROCAL_NORM=True)
    return out


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """factor_n x_n in the dtype of x, multiplied in float32 and rounded once."""
    out = x.new_empty(x.shape)
    _launch_rows(scale_rows_kernel, x, x, factor, out, *x.shape, x.stride(0), out.stride(0))
    return out


def gradient_rows(v: Tensor, x: Tensor, reciprocal: Tensor, factor: Tensor, out: Tensor, tangent: bool = True) -> None:
    """out_n = factor_n v_n; where `tangent`, less the part of v_n along x_n, since x / |x| does not move along x."""
    _launch_rows(
        gradient_rows_kernel,
        v,
        *(v, x, reciprocal, factor, out, *v.shape, v.stride(0), x.stride(0), out.stride(0)),
        TANGENT=tangent,
    )


def filling_rows(D: int) -> int:
    """Rows of a wave whose gradients [rows, D] are a tile of 128 x 256 for each of 132 multiprocessors."""
    return 132 * 128 * 256 // max(D, 1)
