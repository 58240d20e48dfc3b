"""Kernels of the room `linear_energy`; their host functions are in `linear_energy.py`.

SCORE is "energy", "joint_energy" or "all". Classes are the inner loop of the kernels that own rows: the running state
of a row stays in registers, and no two programs add to the same number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oodkern.triton_kernels._tiles import (
    add_exponents,
    finite_pivot,
    log_exponents,
    logits_tile,
    merge_exponents,
    softplus,
)


@triton.jit
def add_top(
    top,  # [ROWS]
    index,  # [ROWS]
    z,  # [ROWS, CLASSES]
    first_class,
    CLASSES: tl.constexpr,
):
    """(largest logit, its index) with a tile added: the lowest index on ties, the first NaN where there is one."""
    classes = first_class + tl.arange(0, CLASSES)
    is_nan = z != z
    tile_top = tl.max(tl.where(is_nan, float("-inf"), z), 1)
    tile_top = tl.where(tl.max(is_nan.to(tl.int32), 1) > 0, float("nan"), tile_top)
    hit = is_nan | (z == tile_top[:, None])
    tile_index = tl.min(tl.where(hit, classes[None, :], 2147483647), 1)
    return merge_top(top, index, tile_top, tile_index)


@triton.jit
def merge_top(top, index, other_top, other_index):
    """Of two parts of a row the one with the larger logit, the first on ties; a NaN is larger than any number."""
    better = (other_top > top) | ((other_top != other_top) & (top == top))
    return tl.where(better, other_top, top), tl.where(better, other_index, index)


@triton.jit
def write_scores(
    energy,  # [N], this and the next four: None where SCORE does not ask for it
    joint_energy,  # [N]
    max_logit,  # [N]
    argmax,  # [N] int64
    msp,  # [N]
    rows,
    inside,
    maximum,
    total,
    joint,
    top,
    index,
    scale,
    SCORE: tl.constexpr,
):
    if SCORE != "joint_energy":
        tl.store(energy + rows, -log_exponents(maximum, total) / scale, mask=inside)
    if SCORE != "energy":
        tl.store(joint_energy + rows, joint, mask=inside)
    if SCORE == "all":
        tl.store(max_logit + rows, top, mask=inside)
        tl.store(argmax + rows, index.to(tl.int64), mask=inside)
        # exp(top + energy) without the cancellation.
        tl.store(msp + rows, tl.exp2(top * scale - finite_pivot(maximum)) / total, mask=inside)


@triton.jit
def score_kernel(
    features,  # [N, D]
    features_stride,
    weight,  # [K, D]
    weight_stride,
    bias,  # [K] or None
    state,  # [5, splits, N] or None: the state of each split of the classes, instead of the scores
    energy,  # [N]
    joint_energy,  # [N]
    max_logit,  # [N]
    argmax,  # [N] int64
    msp,  # [N]
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
    """Programs [row tiles, splits]; each walks over its share of the row tiles, and its classes for each."""
    scale = tl.cast(scale, tl.float32)
    begin = tl.program_id(1) * split_classes
    end = tl.minimum(begin + split_classes, K)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = tile * ROWS
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        joint = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        index = tl.zeros([ROWS], tl.int32) + begin
        for first_class in range(begin, end, CLASSES):
            z = logits_tile(
                *(features, features_stride, row, N, weight, weight_stride, bias, first_class, K, D),
                *(ROWS, CLASSES, DEPTH, DESCRIPTORS),
            )
            if SCORE != "joint_energy":
                maximum, total = add_exponents(maximum, total, z, scale)
            if SCORE != "energy":
                joint += tl.sum(softplus(z), 1)
            if SCORE == "all":
                top, index = add_top(top, index, z, first_class, CLASSES)
        rows = row + tl.arange(0, ROWS)
        inside = rows < N
        if state is None:
            write_scores(
                *(energy, joint_energy, max_logit, argmax, msp, rows, inside),
                *(maximum, total, joint, top, index, scale, SCORE),
            )
        else:
            plane = tl.num_programs(1) * tl.cast(N, tl.int64)
            own = state + tl.program_id(1) * tl.cast(N, tl.int64) + rows
            tl.store(own, maximum, mask=inside)
            tl.store(own + plane, total, mask=inside)
            tl.store(own + 2 * plane, joint, mask=inside)
            if SCORE == "all":
                tl.store(own + 3 * plane, top, mask=inside)
                tl.store(own + 4 * plane, index.to(tl.float32, bitcast=True), mask=inside)


@triton.jit
def merge_kernel(
    state,  # [5, splits, N]
    energy,  # [N]
    joint_energy,  # [N]
    max_logit,  # [N]
    argmax,  # [N] int64
    msp,  # [N]
    N,
    splits,
    scale,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scores from the states of the splits, merged in their order."""
    scale = tl.cast(scale, tl.float32)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    plane = splits * tl.cast(N, tl.int64)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    joint = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    index = tl.zeros([ROWS], tl.int32)
    for split in range(0, splits):
        own = state + tl.cast(split, tl.int64) * N + rows
        if SCORE != "joint_energy":
            other_maximum = tl.load(own, mask=inside, other=float("-inf"))
            other_total = tl.load(own + plane, mask=inside, other=0.0)
            maximum, total = merge_exponents(maximum, total, other_maximum, other_total)
        if SCORE != "energy":
            joint += tl.load(own + 2 * plane, mask=inside, other=0.0)
        if SCORE == "all":
            other_top = tl.load(own + 3 * plane, mask=inside, other=float("-inf"))
            other_index = tl.load(own + 4 * plane, mask=inside, other=0.0).to(tl.int32, bitcast=True)
            top, index = merge_top(top, index, other_top, other_index)
    write_scores(
        *(energy, joint_energy, max_logit, argmax, msp, rows, inside),
        *(maximum, total, joint, top, index, scale, SCORE),
    )
