"""Kernels of the room `contrast`; their host functions, and how they work together, are in `contrast.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from oodkern.triton_kernels._tiles import (
    LN2,
    LOG2E,
    add_exponents,
    finite_pivot,
    log_exponents,
    merge_exponents,
    product_tile,
    store_tile,
)


@triton.jit
def contrast_tile(
    queries,  # [N, D]
    keys,  # [M, D]
    query_reciprocal_ptr,  # [N] float32: 1 / |q_i|
    key_reciprocal_ptr,  # [M] float32: 1 / |k_j|
    row,
    column,
    N,
    M,
    D,
    queries_stride,
    keys_stride,
    scale,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The tile [ROWS, CLASSES] of s at (row, column), times log2(e), -inf outside of the matrix."""
    z = product_tile(
        *(queries, queries_stride, row, N, keys, keys_stride, column, M, D),
        *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, CLASSES)
    if NORMALIZE:
        query_scale = tl.load(query_reciprocal_ptr + rows, mask=rows < N, other=0.0) * scale
        key_scale = tl.load(key_reciprocal_ptr + columns, mask=columns < M, other=0.0)
        z = z * query_scale[:, None] * key_scale[None, :]
    else:
        z = z * scale
    return tl.where((rows[:, None] < N) & (columns[None, :] < M), z, float("-inf"))


@triton.jit
def positive_tile(
    own_ptr,  # [N] int32: the target or the label of each query
    label_ptr,  # [M] int32: the label of each key; not read unless LABELS
    row,
    column,
    N,
    M,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Which keys of the tile are positives of which queries, [ROWS, CLASSES]; any outside of the matrix."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, CLASSES)
    own = tl.load(own_ptr + rows, mask=rows < N, other=0)
    if LABELS:
        label = tl.load(label_ptr + columns, mask=columns < M, other=0)
        return own[:, None] == label[None, :]
    else:
        return own[:, None] == columns[None, :]


@triton.jit
def contrast_kernel(
    queries,  # [N, D]: a block of rows
    keys,  # [M, D]
    query_reciprocal_ptr,  # [N]
    key_reciprocal_ptr,  # [M]
    temperature_ptr,  # [1] float32
    own_ptr,  # [N]
    label_ptr,  # [M]
    row_parts_ptr,  # [splits, 3, N] float32: maximum, total, sum over positives of s log2(e)
    column_parts_ptr,  # [row tiles, 3 where LABELS, else 2, M] float32: the like of each column
    N,
    M,
    D,
    queries_stride,
    keys_stride,
    split_keys,
    NORMALIZE: tl.constexpr,
    LABELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    scale = tl.div_rn(LOG2E, tl.load(temperature_ptr))
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    positive = tl.zeros([ROWS], tl.float32)
    for column in range(split * split_keys, tl.minimum((split + 1) * split_keys, M), CLASSES):
        z = contrast_tile(
            *(queries, keys, query_reciprocal_ptr, key_reciprocal_ptr, row, column, N, M, D),
            *(queries_stride, keys_stride, scale, NORMALIZE, ROWS, CLASSES, DEPTH, DESCRIPTORS),
        )
        mine = positive_tile(own_ptr, label_ptr, row, column, N, M, LABELS, ROWS, CLASSES)
        # Outside of the matrix z is -inf, and what is a positive there must not be added.
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, CLASSES)
        mine = mine & (rows[:, None] < N) & (columns[None, :] < M)
        picked = tl.where(mine, z, 0.0)
        positive += tl.sum(picked, 1)
        maximum, total = add_exponents(maximum, total, z, 1.0)
        if SYMMETRIC:
            column_maximum = tl.max(z, 0)
            column_total = tl.sum(tl.exp2(z - finite_pivot(column_maximum)[None, :]), 0)
            PLANES: tl.constexpr = 3 if LABELS else 2
            part = column_parts_ptr + tl.program_id(0) * PLANES * tl.cast(M, tl.int64) + columns
            tl.store(part, column_maximum, mask=columns < M)
            tl.store(part + M, column_total, mask=columns < M)
            if LABELS:
                tl.store(part + 2 * tl.cast(M, tl.int64), tl.sum(picked, 0), mask=columns < M)
    rows = row + tl.arange(0, ROWS)
    part = row_parts_ptr + split * 3 * tl.cast(N, tl.int64) + rows
    tl.store(part, maximum, mask=rows < N)
    tl.store(part + N, total, mask=rows < N)
    tl.store(part + 2 * tl.cast(N, tl.int64), positive, mask=rows < N)


@triton.jit
def merge_parts_kernel(
    parts_ptr,  # [parts, 3 where POSITIVE, else 2, count] float32: maximum, total, positive; all merged into the first
    lse2_ptr,  # [count] float32: log2 of what the first part stands for now
    parts,
    count,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PLANES: tl.constexpr = 3 if POSITIVE else 2
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    plane = tl.cast(count, tl.int64)
    maximum = tl.load(parts_ptr + places, mask=inside, other=0.0)
    total = tl.load(parts_ptr + plane + places, mask=inside, other=0.0)
    positive = tl.zeros([BLOCK], tl.float32)
    if POSITIVE:
        positive = tl.load(parts_ptr + 2 * plane + places, mask=inside, other=0.0)
    for i in range(1, parts):
        part = parts_ptr + i * PLANES * plane + places
        other_maximum = tl.load(part, mask=inside, other=0.0)
        other_total = tl.load(part + plane, mask=inside, other=0.0)
        maximum, total = merge_exponents(maximum, total, other_maximum, other_total)
        if POSITIVE:
            positive += tl.load(part + 2 * plane, mask=inside, other=0.0)
    tl.store(parts_ptr + places, maximum, mask=inside)
    tl.store(parts_ptr + plane + places, total, mask=inside)
    tl.store(lse2_ptr + places, log_exponents(maximum, total), mask=inside)
    if POSITIVE:
        tl.store(parts_ptr + 2 * plane + places, positive, mask=inside)


@triton.jit
def sum_by_target_kernel(
    target_ptr,  # [N] int32
    value_ptr,  # [N] float32
    out_ptr,  # [M] float32: sum of value_i over the i whose target is j
    N,
    M,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for row in range(0, N, ROWS):
        rows = row + tl.arange(0, ROWS)
        target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
        value = tl.load(value_ptr + rows, mask=rows < N, other=0.0)
        total += tl.where(columns[:, None] == target[None, :], value[None, :], 0.0)
    tl.store(out_ptr + columns, tl.sum(total, 1), mask=columns < M)


@triton.jit
def contrast_gradient_kernel(
    queries,  # [N, D]: a wave of rows
    keys,  # [M, D]
    query_reciprocal_ptr,  # [N]
    key_reciprocal_ptr,  # [M]
    temperature_ptr,  # [1] float32
    own_ptr,  # [N]
    label_ptr,  # [M]
    row_lse_ptr,  # [N] float32
    column_lse_ptr,  # [M] float32; not read unless SYMMETRIC, as everything of columns below
    row_weight_ptr,  # [N] float32: a_i
    column_weight_ptr,  # [M] float32: b_j
    row_hit_ptr,  # [N] float32, subtracted at positives
    column_hit_ptr,  # [M] float32, subtracted at positives; not read unless LABELS
    row_scale_ptr,  # [N] float32: 2^e_i
    out_ptr,  # [N, M] in the dtype of the queries: 2^e_i G_ij; not written unless STORE
    slope_ptr,  # [tiles of keys, N] float32: sum of G_ij s_ij over the keys of the tile
    N,
    M,
    D,
    queries_stride,
    keys_stride,
    NORMALIZE: tl.constexpr,
    LABELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    row_tiles = tl.cdiv(N, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    column = tl.program_id(0) // row_tiles * CLASSES
    z = contrast_tile(
        *(queries, keys, query_reciprocal_ptr, key_reciprocal_ptr, row, column, N, M, D),
        *(queries_stride, keys_stride, tl.div_rn(LOG2E, tl.load(temperature_ptr))),
        *(NORMALIZE, ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, CLASSES)
    row_weight = tl.load(row_weight_ptr + rows, mask=rows < N, other=0.0)
    row_lse = tl.load(row_lse_ptr + rows, mask=rows < N, other=0.0)
    gradient = row_weight[:, None] * tl.exp2(z - row_lse[:, None] * LOG2E)
    if SYMMETRIC:
        column_weight = tl.load(column_weight_ptr + columns, mask=columns < M, other=0.0)
        column_lse = tl.load(column_lse_ptr + columns, mask=columns < M, other=0.0)
        gradient += column_weight[None, :] * tl.exp2(z - column_lse[None, :] * LOG2E)
    hit = tl.load(row_hit_ptr + rows, mask=rows < N, other=0.0)[:, None]
    if SYMMETRIC and LABELS:
        hit = hit + tl.load(column_hit_ptr + columns, mask=columns < M, other=0.0)[None, :]
    mine = positive_tile(own_ptr, label_ptr, row, column, N, M, LABELS, ROWS, CLASSES)
    gradient = tl.where(mine, gradient - hit, gradient)
    if STORE:
        scale = tl.load(row_scale_ptr + rows, mask=rows < N, other=0.0)
        store_tile(out_ptr, gradient * scale[:, None], row, column, N, M, ROWS, CLASSES)
    inside = (rows[:, None] < N) & (columns[None, :] < M)
    slope = tl.sum(tl.where(inside, gradient * z, 0.0), 1) * LN2
    tl.store(slope_ptr + tl.program_id(0) // row_tiles * tl.cast(N, tl.int64) + rows, slope, mask=rows < N)
