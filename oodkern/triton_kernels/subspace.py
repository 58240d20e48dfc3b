"""Triton kernels of room `subspace`; the formulas stand in oodkern.ops.subspace.

Alignment: a program owns a tile of rows, walks classes and sums |cos| where it arises. The gradients, in waves of
rows, are products with the tile of signs s_nk, which 16 bits hold exactly:

    V = S W' with rows w'_k = w_k / |w_k|,    v = S^T Y with rows Y_n = 2^e g_n x'_n

of which the parts along x_n and w_k are taken away in float32. Workspace: a wave, W', and v in float32.

The energies are products in float32 whatever the features are: 16 bits of y = U^T x would be off by more than what is
left outside.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from oodkern.triton_kernels._host import (
    add_product,
    launch,
    operand,
    power_of_two,
    product,
    rows_dense,
    split_columns,
    tile_for,
    waves,
)
from oodkern.triton_kernels._rows import filling_rows, gradient_rows, reciprocal_norms, row_dot, scale_rows
from oodkern.triton_kernels.subspace_kernels import alignment_kernel, residual_kernel, sign_kernel

# Waves of the energies take half of what those of slopes may: theirs have [wave, D] in float32 as well.
HALF = 2


def alignment(features: Tensor, weight: Tensor) -> Tensor:
    features, weight = rows_dense(features), rows_dense(weight)
    (N, D), K = features.shape, len(weight)
    if N == 0 or K == 0:
        return features.new_zeros(N, dtype=torch.float32)
    tile = tile_for("alignment", features, K, features, weight)
    row_tiles = triton.cdiv(N, tile.rows)
    splits, split_classes = split_columns(row_tiles, K, tile.classes)
    parts = features.new_empty((splits, N), dtype=torch.float32)
    launch(
        alignment_kernel,
        (row_tiles, splits),
        *(operand(features, tile.rows, tile), operand(weight, tile.classes, tile)),
        *(reciprocal_norms(weight), parts),
        *(N, K, D, features.stride(0), weight.stride(0), split_classes),
        **tile.constants(),
    )
    return parts.sum(0).mul_(reciprocal_norms(features)).div_(K)


def alignment_backward(
    grad: Tensor, features: Tensor, weight: Tensor, for_features: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    features, weight = rows_dense(features), rows_dense(weight)
    (N, D), K = features.shape, len(weight)
    features_gradient = features.new_empty((N, D) if for_features else 0)
    weight_gradient = weight.new_empty((K, D) if for_weight else 0)
    reciprocal, weight_reciprocal = reciprocal_norms(features), reciprocal_norms(weight)
    share = grad / max(K, 1)
    factor = share * reciprocal
    scale = power_of_two(share.abs())
    total = features.new_zeros((K, D) if for_weight else 0, dtype=torch.float32)
    unit_weight = scale_rows(weight, weight_reciprocal) if for_features else weight
    tile = tile_for("sign", features, K, features, weight)
    described = operand(weight, tile.classes, tile)
    for begin, end in waves(N, (K + D) * features.element_size() + 4 * D, filling_rows(D)):
        wave = features[begin:end]
        signs = features.new_empty((end - begin, K))
        launch(
            sign_kernel,
            (triton.cdiv(end - begin, tile.rows) * triton.cdiv(K, tile.classes),),
            *(operand(wave, tile.rows, tile), described, signs),
            *(end - begin, K, D, features.stride(0), weight.stride(0)),
            **tile.constants(),
        )
        if for_features:
            v = product(signs, unit_weight)
            gradient_rows(v, wave, reciprocal[begin:end], factor[begin:end], features_gradient[begin:end])
        if for_weight:
            add_product(total, signs.T, scale_rows(wave, factor[begin:end] * scale))
    if for_weight:
        gradient_rows(total, weight, weight_reciprocal, weight_reciprocal / scale, weight_gradient)
    return features_gradient, weight_gradient


def subspace_energy(features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    features, u = rows_dense(features), _basis(basis)
    (N, D), r = features.shape, basis.shape[1]
    inside, outside = (features.new_empty(N, dtype=torch.float32) for _ in range(2))
    tile = tile_for("residual", u, D)
    for begin, end in waves(N, HALF * 4 * (D + r)):
        x = rows_dense(features[begin:end].float())
        y = product(x, u)
        row_tiles = triton.cdiv(end - begin, tile.rows)
        splits, columns = split_columns(row_tiles, max(D, 1), tile.classes)
        parts = features.new_empty((splits, end - begin), dtype=torch.float32)
        launch(
            residual_kernel,
            (row_tiles, splits),
            *(x, y, u, parts),
            *(end - begin, D, r, x.stride(0), y.stride(0), u.stride(0), columns),
            **tile.constants(descriptors=False),
        )
        inside[begin:end] = row_dot(y, y)
        outside[begin:end] = parts.sum(0)
    return inside, outside


def subspace_energy_backward(
    grad_inside: Tensor, grad_outside: Tensor, features: Tensor, basis: Tensor, for_features: bool, for_basis: bool
) -> tuple[Tensor, Tensor]:
    features, u = rows_dense(features), _basis(basis)
    (N, D), r = features.shape, basis.shape[1]
    features_gradient = features.new_empty((N, D) if for_features else 0)
    total = features.new_zeros((D, r) if for_basis else 0, dtype=torch.float32)
    for begin, end in waves(N, HALF * 4 * (3 * D + 6 * r)):
        a, b = 2 * grad_inside[begin:end, None], 2 * grad_outside[begin:end, None]
        x, y, residual, s = _projected(features[begin:end], u)
        q = a * y - b * s
        if for_basis:
            add_product(total, x.T, q)
            add_product(total, residual.T, -b * y)
        if for_features:
            add_product(residual.mul_(b), q, u.T)
            features_gradient[begin:end] = residual
    return features_gradient, total.to(basis.dtype)


def subspace_energy_double_backward(
    features_cotangent: Tensor | None,
    basis_cotangent: Tensor | None,
    grad_inside: Tensor,
    grad_outside: Tensor,
    features: Tensor,
    basis: Tensor,
    for_features: bool,
    for_basis: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, u = rows_dense(features), _basis(basis)
    (N, D), r = features.shape, basis.shape[1]
    c = None if basis_cotangent is None else _basis(basis_cotangent)
    inside, outside = (features.new_empty(N, dtype=torch.float32) for _ in range(2))
    features_gradient = features.new_empty((N, D) if for_features else 0)
    total = features.new_zeros((D, r) if for_basis else 0, dtype=torch.float32)
    for begin, end in waves(N, HALF * 4 * (6 * D + 12 * r)):
        a, b = 2 * grad_inside[begin:end, None], 2 * grad_outside[begin:end, None]
        x, y, residual, s = _projected(features[begin:end], u)
        # y' = U^T v + C^T x and R' = v - C y - U y'.
        y_change = torch.zeros_like(y)
        residual_change = torch.zeros(x.shape, device=x.device)
        v = None if features_cotangent is None else features_cotangent[begin:end].float()
        if v is not None:
            add_product(y_change, v, u)
            residual_change += v
        if c is not None:
            add_product(y_change, x, c)
            add_product(residual_change, -y, c.T)
        add_product(residual_change, -y_change, u.T)
        inside[begin:end] = row_dot(y, y_change, 2.0)
        outside[begin:end] = row_dot(residual, residual_change, 2.0)
        q = a * y - b * s
        bent = product(residual_change, u)
        if c is not None:
            add_product(bent, residual, c)
        p = a * y_change - b * bent
        if for_basis:
            add_product(total, x.T, p)
            if v is not None:
                add_product(total, v.T, q)
            add_product(total, residual_change.T, -b * y)
            add_product(total, residual.T, -b * y_change)
        if for_features:
            add_product(residual_change.mul_(b), p, u.T)
            if c is not None:
                add_product(residual_change, q, c.T)
            features_gradient[begin:end] = residual_change
    return inside, outside, features_gradient, total.to(basis.dtype)


def _basis(basis: Tensor) -> Tensor:
    return rows_dense(basis.float())


def _projected(features: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y = U^T x, R = x - U y and s = U^T R of each row, float32."""
    x = features.float()
    y = product(x, u)
    residual = x.clone(memory_format=torch.contiguous_format)
    add_product(residual, -y, u.T)
    return x, y, residual, product(residual, u)
