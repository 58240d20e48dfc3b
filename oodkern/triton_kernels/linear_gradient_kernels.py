"""Kernels of the derivatives of `linear_energy`: tiles of slopes, which products with W, X, U, V follow.

With logits z, scores S and upstream gradients g: slopes p = dS/dz, curvatures q = d/dz sum_j t_j p_j for the tangent
t = V W^T + X U^T + c of the logits. Of the energy E with softmax s and u = sum_k p t: p = -s, q = -(s / T) (t + u);
of JointEnergy with sigmoid s: p = s, q = s (1 - s) t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oodkern.triton_kernels._tiles import LN2, LOG2E, finite_pivot, logits_tile, product_tile, sigmoid

# Row tiles that share each tile of weight while it is in the L2 cache.
GROUP = tl.constexpr(16)


@triton.jit
def tile_position(first_row, N, K, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """(row tile, class tile) of this program: rows run fastest, in groups of GROUP tiles."""
    row_tiles = tl.cdiv(N - first_row, ROWS)
    class_tiles = tl.cdiv(K, CLASSES)
    in_group = GROUP * class_tiles
    group = tl.program_id(0) // in_group
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % in_group
    return group * GROUP + within % size, within // size


@triton.jit
def load_row(numbers, rows, N):
    """[ROWS] of numbers [N], float32, zero outside."""
    return tl.load(numbers + rows, mask=rows < N, other=0.0)


@triton.jit
def slope_tile(
    z,  # [ROWS, CLASSES]
    value,  # [ROWS], the score
    scale,
    SCORE: tl.constexpr,
):
    """p = dS/dz. Of a row of all -inf, whose energy is +inf: 0."""
    if SCORE == "energy":
        return -tl.exp2(z * scale + finite_pivot(value * scale)[:, None])
    else:
        return sigmoid(z)


@triton.jit
def curvature_tile(
    z,  # [ROWS, CLASSES]
    p,  # [ROWS, CLASSES]
    t,  # [ROWS, CLASSES]
    u,  # [ROWS]
    scale,
    SCORE: tl.constexpr,
):
    """q = d/dz sum_j t_j p_j; 1 / T is scale ln 2."""
    if SCORE == "energy":
        return p * (t + u[:, None]) * (scale * LN2)
    else:
        e = tl.exp2(-tl.abs(z) * LOG2E)
        return e / ((1.0 + e) * (1.0 + e)) * t


@triton.jit
def tangent_tile(
    features,  # [N, D]
    features_stride,
    row,
    N,
    weight,  # [K, D]
    weight_stride,
    features_tangent,  # V [N, D] or None
    features_tangent_stride,
    weight_tangent,  # U [K, D] or None
    weight_tangent_stride,
    bias_tangent,  # c [K] or None
    first_class,
    K,
    D,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """t = V W^T + X U^T + c at (row, first_class), float32; 0 from class K on."""
    t = tl.zeros([ROWS, CLASSES], tl.float32)
    if features_tangent is not None:
        t += product_tile(
            *(features_tangent, features_tangent_stride, row, N, weight, weight_stride, first_class, K, D),
            *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
        )
    if weight_tangent is not None:
        t += product_tile(
            *(features, features_stride, row, N, weight_tangent, weight_tangent_stride, first_class, K, D),
            *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
        )
    classes = first_class + tl.arange(0, CLASSES)
    if bias_tangent is not None:
        t += tl.load(bias_tangent + classes, mask=classes < K, other=0.0).to(tl.float32)[None, :]
    return tl.where(classes[None, :] < K, t, 0.0)


@triton.jit
def store_wave(
    values,  # [ROWS, CLASSES]
    matrix,  # [wave, K], whose rows start at multiples of 16 bytes
    stride,
    row,
    first_class,
    inside,  # [ROWS, CLASSES]
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    first = matrix + tl.cast(row, tl.int64) * stride + first_class
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, CLASSES)[None, :]
    tl.store(first + offsets, values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def slope_kernel(
    features,  # [N, D]
    features_stride,
    weight,  # [K, D]
    weight_stride,
    bias,  # [K] or None
    value,  # [N]
    upstream,  # [N]
    slopes,  # [wave, K] or None: g p, of rows from first_row on
    slopes_stride,
    column_sums,  # [row tiles of the wave, K] or None: sum of g p over the rows of a tile
    first_row,
    N,
    K,
    D,
    scale,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One tile of g p. N is where the wave ends."""
    scale = tl.cast(scale, tl.float32)
    tile, class_tile = tile_position(first_row, N, K, ROWS, CLASSES)
    row = first_row + tile * ROWS
    first_class = class_tile * CLASSES
    rows = row + tl.arange(0, ROWS)
    classes = first_class + tl.arange(0, CLASSES)
    inside = (rows[:, None] < N) & (classes[None, :] < K)
    z = logits_tile(
        *(features, features_stride, row, N, weight, weight_stride, bias, first_class, K, D),
        *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    p = slope_tile(z, load_row(value, rows, N), scale, SCORE) * load_row(upstream, rows, N)[:, None]
    if slopes is not None:
        store_wave(p, slopes, slopes_stride, tile * ROWS, first_class, inside, ROWS, CLASSES)
    if column_sums is not None:
        sums = tl.sum(tl.where(inside, p, 0.0), 0)
        tl.store(column_sums + tl.cast(tile, tl.int64) * K + classes, sums, mask=classes < K)


@triton.jit
def tangent_kernel(
    features,  # [N, D]
    features_stride,
    weight,  # [K, D]
    weight_stride,
    bias,  # [K] or None
    features_tangent,  # V [N, D] or None
    features_tangent_stride,
    weight_tangent,  # U [K, D] or None
    weight_tangent_stride,
    bias_tangent,  # c [K] or None
    value,  # [N]
    tangent,  # [splits, N]: u = sum of p t over the classes of a split
    largest,  # [splits, N]: max of |t|
    N,
    K,
    D,
    scale,
    split_classes,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Programs [row tiles, splits], as in `score_kernel`."""
    scale = tl.cast(scale, tl.float32)
    begin = tl.program_id(1) * split_classes
    end = tl.minimum(begin + split_classes, K)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        rows = row + tl.arange(0, ROWS)
        row_value = load_row(value, rows, N)
        u = tl.zeros([ROWS], tl.float32)
        bound = tl.zeros([ROWS], tl.float32)
        for first_class in range(begin, end, CLASSES):
            z = logits_tile(
                *(features, features_stride, row, N, weight, weight_stride, bias, first_class, K, D),
                *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
            )
            t = tangent_tile(
                *(features, features_stride, row, N, weight, weight_stride),
                *(features_tangent, features_tangent_stride, weight_tangent, weight_tangent_stride, bias_tangent),
                *(first_class, K, D, ROWS, CLASSES, DEPTH, DESCRIPTORS),
            )
            u += tl.sum(slope_tile(z, row_value, scale, SCORE) * t, 1)
            bound = tl.maximum(bound, tl.max(tl.abs(t), 1))
        own = tl.program_id(1) * tl.cast(N, tl.int64) + rows
        tl.store(tangent + own, u, mask=rows < N)
        tl.store(largest + own, bound, mask=rows < N)


@triton.jit
def curvature_kernel(
    features,  # [N, D]
    features_stride,
    weight,  # [K, D]
    weight_stride,
    bias,  # [K] or None
    features_tangent,  # V [N, D] or None
    features_tangent_stride,
    weight_tangent,  # U [K, D] or None
    weight_tangent_stride,
    bias_tangent,  # c [K] or None
    value,  # [N]
    tangent,  # [N], u
    slope_upstream,  # [N], g, perhaps times a power of two
    curvature_upstream,  # [N], g, perhaps times another one
    slopes,  # [wave, K] or None: g p
    curvatures,  # [wave, K] or None: g q
    stride,  # of both
    column_sums,  # [row tiles of the wave, K] or None: sum of g q over the rows of a tile
    first_row,
    N,
    K,
    D,
    scale,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One tile of g p and of g q. N is where the wave ends."""
    scale = tl.cast(scale, tl.float32)
    tile, class_tile = tile_position(first_row, N, K, ROWS, CLASSES)
    row = first_row + tile * ROWS
    first_class = class_tile * CLASSES
    rows = row + tl.arange(0, ROWS)
    classes = first_class + tl.arange(0, CLASSES)
    inside = (rows[:, None] < N) & (classes[None, :] < K)
    z = logits_tile(
        *(features, features_stride, row, N, weight, weight_stride, bias, first_class, K, D),
        *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    t = tangent_tile(
        *(features, features_stride, row, N, weight, weight_stride),
        *(features_tangent, features_tangent_stride, weight_tangent, weight_tangent_stride, bias_tangent),
        *(first_class, K, D, ROWS, CLASSES, DEPTH, DESCRIPTORS),
    )
    p = slope_tile(z, load_row(value, rows, N), scale, SCORE)
    if slopes is not None:
        g = load_row(slope_upstream, rows, N)[:, None]
        store_wave(p * g, slopes, stride, tile * ROWS, first_class, inside, ROWS, CLASSES)
    q = curvature_tile(z, p, t, load_row(tangent, rows, N), scale, SCORE)
    q *= load_row(curvature_upstream, rows, N)[:, None]
    if curvatures is not None:
        store_wave(q, curvatures, stride, tile * ROWS, first_class, inside, ROWS, CLASSES)
    if column_sums is not None:
        sums = tl.sum(tl.where(inside, q, 0.0), 0)
        tl.store(column_sums + tl.cast(tile, tl.int64) * K + classes, sums, mask=classes < K)
