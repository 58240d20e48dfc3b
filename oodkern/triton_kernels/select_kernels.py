"""Kernels of the room `select`; their host functions are in `select.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from oodkern.triton_kernels._tiles import product_tile
from oodkern.triton_kernels.linear_energy_kernels import add_top, merge_top


@triton.jit
def nearest_kernel(
    features,  # [N, D]
    centers,  # [K, D]
    half_square_ptr,  # [K] float32: |c_k|^2 / 2
    top_ptr,  # [splits, N] float32: the largest x . c - |c|^2 / 2 of the split
    index_ptr,  # [splits, N] int32: whose it is
    N,
    K,
    D,
    features_stride,
    centers_stride,
    split_centers,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    begin = split * split_centers
    top = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32) + begin
    for first in range(begin, tl.minimum(begin + split_centers, K), CLASSES):
        z = product_tile(
            *(features, features_stride, row, N, centers, centers_stride, first, K, D),
            *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
        )
        places = first + tl.arange(0, CLASSES)
        half_square = tl.load(half_square_ptr + places, mask=places < K, other=0.0)
        z = tl.where(places[None, :] < K, z - half_square[None, :], float("-inf"))
        top, index = add_top(top, index, z, first, CLASSES)
    rows = row + tl.arange(0, ROWS)
    part = tl.cast(split, tl.int64) * N + rows
    tl.store(top_ptr + part, top, mask=rows < N)
    tl.store(index_ptr + part, index, mask=rows < N)


@triton.jit
def distance_kernel(
    features,  # [N, D]
    centers,  # [K, D]
    top_ptr,  # [splits, N] float32
    index_parts_ptr,  # [splits, N] int32
    index_ptr,  # [N] int64
    distance_ptr,  # [N] float32: sum of (x - c)^2
    N,
    D,
    splits,
    features_stride,
    centers_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.load(top_ptr + rows, mask=rows < N, other=0.0)
    index = tl.load(index_parts_ptr + rows, mask=rows < N, other=0)
    for split in range(1, splits):
        part = tl.cast(split, tl.int64) * N + rows
        other = tl.load(top_ptr + part, mask=rows < N, other=0.0)
        other_index = tl.load(index_parts_ptr + part, mask=rows < N, other=0)
        top, index = merge_top(top, index, other, other_index)
    x_rows = features + rows.to(tl.int64)[:, None] * features_stride
    c_rows = centers + index.to(tl.int64)[:, None] * centers_stride
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        c = tl.load(c_rows + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += (x - c) * (x - c)
    tl.store(index_ptr + rows, index.to(tl.int64), mask=rows < N)
    tl.store(distance_ptr + rows, tl.sum(sums, 1), mask=rows < N)
