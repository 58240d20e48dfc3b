"""Kernels of the room `subspace`; their host functions, and how they work together, are in `subspace.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from oodkern.triton_kernels._tiles import load_tile, product_tile, store_tile


@triton.jit
def alignment_kernel(
    features,  # [N, D]
    weight,  # [K, D]
    weight_reciprocal_ptr,  # [K] float32: 1 / |w_k|
    out_ptr,  # [splits, N] float32: sum of |x . w'_k| over the classes of the split
    N,
    K,
    D,
    features_stride,
    weight_stride,
    split_classes,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(split * split_classes, tl.minimum((split + 1) * split_classes, K), CLASSES):
        z = product_tile(
            *(features, features_stride, row, N, weight, weight_stride, first, K, D),
            *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
        )
        classes = first + tl.arange(0, CLASSES)
        reciprocal = tl.load(weight_reciprocal_ptr + classes, mask=classes < K, other=0.0)
        total += tl.sum(tl.abs(z) * reciprocal[None, :], 1)
    rows = row + tl.arange(0, ROWS)
    tl.store(out_ptr + tl.cast(split, tl.int64) * N + rows, total, mask=rows < N)


@triton.jit
def sign_kernel(
    features,  # [N, D]
    weight,  # [K, D]
    out_ptr,  # [N, K] in the dtype of the features: sign of x . w_k
    N,
    K,
    D,
    features_stride,
    weight_stride,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row_tiles = tl.cdiv(N, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    first = tl.program_id(0) // row_tiles * CLASSES
    z = product_tile(
        *(features, features_stride, row, N, weight, weight_stride, first, K, D),
        *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    sign = tl.where(z > 0.0, 1.0, tl.where(z < 0.0, -1.0, 0.0))
    store_tile(out_ptr, sign, row, first, N, K, ROWS, CLASSES)


@triton.jit
def residual_kernel(
    features,  # [N, D]
    inside,  # [N, r] float32: U^T x
    basis,  # [D, r] float32
    out_ptr,  # [splits, N] float32: sum of (x - U U^T x)^2 over the columns of the split
    N,
    D,
    r,
    features_stride,
    inside_stride,
    basis_stride,
    split_columns,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    total = tl.zeros([ROWS], tl.float32)
    for column in range(split * split_columns, tl.minimum((split + 1) * split_columns, D), CLASSES):
        projection = product_tile(
            *(inside, inside_stride, row, N, basis, basis_stride, column, D, r),
            *(ROWS, CLASSES, DEPTH, False),
        )
        x = load_tile(features, features_stride, row, column, N, D, ROWS, CLASSES, False).to(tl.float32)
        residual = x - projection
        total += tl.sum(residual * residual, 1)
    rows = row + tl.arange(0, ROWS)
    tl.store(out_ptr + tl.cast(split, tl.int64) * N + rows, total, mask=rows < N)
