"""Triton kernels of room `linear_energy`: host functions. The formulas stand in oodkern.ops.linear_energy.

Scores: a program owns a tile of rows and walks the classes. Derivatives, in waves of rows: a kernel forms the logits
anew and writes g p (and g q) of a wave, [wave, K] in the dtype of the features; cuBLAS multiplies it with W, X, U, V
while it is in the L2 cache. Its float16 numbers are multiplied by a power of two that is divided out in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from oodkern.triton_kernels._host import (
    add_product,
    launch,
    operand,
    power_of_two,
    processors,
    product,
    rows_dense,
    split_columns,
    tile_for,
    waves,
)
from oodkern.triton_kernels.configs import Tile
from oodkern.triton_kernels.linear_energy_kernels import merge_kernel, score_kernel
from oodkern.triton_kernels.linear_gradient_kernels import curvature_kernel, slope_kernel, tangent_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MERGED_ROWS = 128


class Head:
    """The product features @ weight.T + bias as kernels take it."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        if features.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(
                f"features: Triton's kernels take {names}, got {str(features.dtype).removeprefix('torch.')}"
            )
        self.features, self.weight = rows_dense(features), rows_dense(weight)
        self.bias = None if bias is None else bias.contiguous()
        (self.N, self.D), self.K = features.shape, len(weight)
        self.scale = 1.0 / (math.log(2.0) * temperature)
        self.temperature = temperature

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.N, self.K, self.D

    def operands(self, tile: Tile) -> tuple[Any, ...]:
        """features, its stride, weight, its stride, bias."""
        return *matrix(self.features, tile.rows, tile), *matrix(self.weight, tile.classes, tile), self.bias

    def grid(self, tile: Tile) -> tuple[tuple[int, int], int]:
        """Programs [row tiles, splits] of a kernel that owns rows, and the classes of a split."""
        row_tiles = triton.cdiv(self.N, tile.rows)
        resident = tile.resident * processors(self.features.device)
        splits, split_classes = split_columns(row_tiles, self.K, tile.classes, 2 * resident)
        return (row_tiles if splits > 1 else min(row_tiles, resident), splits), split_classes

    def waves(self, tile: Tile, matrices: int) -> Iterator[tuple[int, int, tuple[int]]]:
        """(begin, end, grid) of waves of rows with `matrices` of [wave, K]; a wave's product with W fills the GPU."""
        row_bytes = matrices * self.K * self.features.element_size()
        fill = processors(self.features.device) * 128 * 256 // max(self.D, 1)
        for begin, end in waves(self.N, row_bytes, fill):
            yield begin, end, (triton.cdiv(end - begin, tile.rows) * triton.cdiv(self.K, tile.classes),)

    def nothing(self) -> Tensor:
        return self.features.new_empty(0)

    def zeros(self, *shape: int) -> Tensor:
        return self.features.new_zeros(shape, dtype=torch.float32)

    def empty(self, *shape: int) -> Tensor:
        return self.features.new_empty(shape, dtype=torch.float32)


def matrix(tensor: Tensor | None, rows: int, tile: Tile) -> tuple[Any, int]:
    """A matrix and its stride as arguments of a kernel."""
    return operand(tensor, rows, tile), 0 if tensor is None else tensor.stride(0)


class Wave:
    """Room for [wave, K] numbers in the dtype of the features, with rows that start at multiples of 16 bytes."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.stride = triton.cdiv(head.K, 8) * 8
        self.room = head.nothing()

    def rows(self, count: int) -> Tensor:
        if len(self.room) < count:  # the first wave is the largest
            self.room = self.head.features.new_empty((count, self.stride))
        return self.room[:count, : self.head.K]


def normalised(upstream: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The upstream times a power of two, and the factor that takes it back (None for 1).

    Only float16 needs it; see `power_of_two`. `magnitudes` [N] bound what is to be stored of each row.
    """
    if dtype != torch.float16:
        return upstream.contiguous(), None
    power = power_of_two(magnitudes)
    return (upstream * power).contiguous(), 1.0 / power


def finished(total: Tensor, inverse: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (total if inverse is None else total * inverse).to(dtype)


def _scores(score: str, head: Head, *outputs: Tensor | None) -> None:
    kernel = {"all": "linear_scores"}.get(score, f"linear_{score}")
    tile = tile_for(kernel, head.features, head.K, head.features, head.weight)
    grid, split_classes = head.grid(tile)
    state = head.empty(5, grid[1], head.N) if grid[1] > 1 else None
    launch(
        score_kernel,
        grid,
        *(*head.operands(tile), state, *outputs, *head.sizes, head.scale, split_classes),
        SCORE=score,
        **tile.constants(),
    )
    if state is not None:
        merged = (triton.cdiv(head.N, MERGED_ROWS),)
        launch(
            merge_kernel,
            merged,
            *(state, *outputs, head.N, grid[1], head.scale),
            SCORE=score,
            ROWS=MERGED_ROWS,
            num_warps=4,
        )


def linear_score(score: str, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    head = Head(features, weight, bias, temperature)
    result = head.empty(head.N)
    outputs = (result, None) if score == "energy" else (None, result)
    _scores(score, head, *outputs, None, None, None)
    return result


def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    head = Head(features, weight, bias, 1.0)
    argmax = features.new_empty(head.N, dtype=torch.int64)
    energy, joint_energy, max_logit, msp = (head.empty(head.N) for _ in range(4))
    _scores("all", head, energy, joint_energy, max_logit, argmax, msp)
    return energy, joint_energy, max_logit, argmax, msp


def linear_score_backward(
    score: str,
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    temperature: float,
    for_features: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head, dtype = Head(features, weight, bias, temperature), features.dtype
    for_bias = for_bias and bias is not None
    value, (upstream, inverse) = value.contiguous(), normalised(grad, grad.abs(), dtype)
    features_gradient = features.new_empty((head.N, head.D)) if for_features else head.nothing()
    weight_total = head.zeros(head.K, head.D) if for_weight else head.nothing()
    bias_total = head.zeros(head.K) if for_bias else head.nothing()
    tile = tile_for("linear_slope", features, head.K, head.features, head.weight)
    slopes, wave, operands = None, Wave(head), head.operands(tile)
    for begin, end, grid in head.waves(tile, 1) if for_features or for_weight or for_bias else ():
        if for_features or for_weight:
            slopes = wave.rows(end - begin)
        sums = head.empty(triton.cdiv(end - begin, tile.rows), head.K) if for_bias else None
        launch(
            slope_kernel,
            grid,
            *(*operands, value, upstream),
            *(slopes, wave.stride, sums, begin, end, head.K, head.D, head.scale),
            SCORE=score,
            **tile.constants(),
        )
        if slopes is not None:
            if for_features:
                _write(features_gradient[begin:end], (slopes, head.weight, inverse))
            if for_weight:
                add_product(weight_total, slopes.T, head.features[begin:end])
        if sums is not None:
            bias_total += sums.sum(0)
    return (
        features_gradient,
        finished(weight_total, inverse, dtype),
        finished(bias_total, inverse, dtype),
    )


def _write(out: Tensor, *products: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """out = sum of factor * (left @ right) over the products, added in float32 and rounded once."""
    (left, right, factor), *rest = products
    if factor is None and not rest:
        product(left, right, out=out)
        return
    total = product(left, right)
    if factor is not None:
        total *= factor
    for one in rest:
        add_product(total, *one)
    out.copy_(total)


def linear_score_double_backward(
    score: str,
    features_cotangent: Tensor | None,
    weight_cotangent: Tensor | None,
    bias_cotangent: Tensor | None,
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    temperature: float,
    for_features: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head, dtype = Head(features, weight, bias, temperature), features.dtype
    for_bias = for_bias and bias is not None
    V = None if features_cotangent is None else rows_dense(features_cotangent)
    U = None if weight_cotangent is None else rows_dense(weight_cotangent)
    c = None if bias_cotangent is None else bias_cotangent.contiguous()
    value = value.contiguous()

    def tangents(tile: Tile) -> tuple[Any, ...]:
        return *matrix(V, tile.rows, tile), *matrix(U, tile.classes, tile), c

    tile = tile_for("linear_tangent", features, head.K, head.features, head.weight, V, U)
    grid, split_classes = head.grid(tile)
    parts, largest = head.empty(grid[1], head.N), head.empty(grid[1], head.N)
    launch(
        tangent_kernel,
        grid,
        *(*head.operands(tile), *tangents(tile), value, parts, largest),
        *(*head.sizes, head.scale, split_classes),
        SCORE=score,
        **tile.constants(),
    )
    u = parts.sum(0) if grid[1] > 1 else parts[0]
    # |q| is at most 2 max |t| / T for the energy, whose softmax is at most 1, and max |t| / 4 for JointEnergy.
    steepest = 2.0 / temperature if score == "energy" else 0.25
    slope_upstream, slope_inverse = normalised(grad, grad.abs(), dtype)
    upstream, inverse = normalised(grad, grad.abs() * largest.amax(0) * steepest, dtype)

    features_gradient = features.new_empty((head.N, head.D)) if for_features else head.nothing()
    weight_total = head.zeros(head.K, head.D) if for_weight else head.nothing()
    bias_total = head.zeros(head.K) if for_bias else head.nothing()
    tile = tile_for("linear_curvature", features, head.K, head.features, head.weight, V, U)
    with_slopes = (for_features and U is not None) or (for_weight and V is not None)
    slopes = curvatures = None
    slope_wave, wave, operands = Wave(head), Wave(head), (*head.operands(tile), *tangents(tile))
    for begin, end, tiles in head.waves(tile, 1 + with_slopes) if for_features or for_weight or for_bias else ():
        if with_slopes:
            slopes = slope_wave.rows(end - begin)
        if for_features or for_weight:
            curvatures = wave.rows(end - begin)
        sums = head.empty(triton.cdiv(end - begin, tile.rows), head.K) if for_bias else None
        launch(
            curvature_kernel,
            tiles,
            *(*operands, value, u, slope_upstream, upstream),
            *(slopes, curvatures, wave.stride, sums, begin, end, head.K, head.D, head.scale),
            SCORE=score,
            **tile.constants(),
        )
        if for_features and curvatures is not None:
            products = [(curvatures, head.weight, inverse)]
            if slopes is not None and U is not None:
                products.append((slopes, U, slope_inverse))
            _write(features_gradient[begin:end], *products)
        if for_weight and curvatures is not None:
            add_product(weight_total, curvatures.T, head.features[begin:end], inverse)
            if slopes is not None and V is not None:
                add_product(weight_total, slopes.T, V[begin:end], slope_inverse)
        if sums is not None:
            bias_total += sums.sum(0)
    return u, features_gradient, weight_total.to(dtype), finished(bias_total, inverse, dtype)
