"""A product in float32 proper, for float32 operands where cuBLAS has been told to use TF32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    left,  # [M, inner]
    right,  # [inner, N]
    out,  # [M, N]
    left_row,  # strides
    left_column,
    right_row,
    right_column,
    M,
    N,
    inner,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile [ROWS, CLASSES] of left @ right for operands of any strides."""
    column_tiles = tl.cdiv(N, CLASSES)
    row = tl.cast(tl.program_id(0) // column_tiles * ROWS, tl.int64)
    column = tl.cast(tl.program_id(0) % column_tiles * CLASSES, tl.int64)
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, CLASSES)[None, :]
    d = tl.arange(0, DEPTH)
    a_first = left + row * left_row
    b_first = right + column * right_column
    total = tl.zeros([ROWS, CLASSES], tl.float32)
    for step in range(0, inner, DEPTH):
        depth = tl.cast(step, tl.int64)
        a_inside = (i < M - row) & (d[None, :] < inner - step)
        b_inside = (j < N - column) & (d[:, None] < inner - step)
        a = tl.load(a_first + depth * left_column + i * left_row + d[None, :] * left_column, mask=a_inside, other=0.0)
        b = tl.load(b_first + depth * right_row + d[:, None] * right_row + j * right_column, mask=b_inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    inside = (i < M - row) & (j < N - column)
    tl.store(out + row * N + column + i * N + j, total, mask=inside)
