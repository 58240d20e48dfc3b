"""Triton kernels of room `contrast`; the formulas stand in oodkern.ops.contrast.

Forward, one sweep over the tiles of s = q k^T / T: a program owns a tile of rows, walks keys, keeps each row's
logsumexp in registers and writes what its rows add to each column's. Rows come in blocks, so that these parts stay
small; after each block they are merged, in order, into the state of the columns.

Backward, in waves of rows: one kernel forms the tile again and writes E_ij = 2^e_i G_ij, which is then multiplied
twice, by keys for the queries' gradient and by queries for the keys'. Rows are brought to norm 1 before they are
multiplied, since a reciprocal norm in the 16-bit tile could leave the range of float16. e_i makes the largest |G_ij|
of a row a few thousands, whatever the upstream gradient is: float16 then holds a softmax that is flat over millions.
Workspace: a wave, the keys at norm 1, and the keys' gradient in float32, to which waves are added in their order.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from oodkern.triton_kernels._host import (
    add_product,
    launch,
    operand,
    product,
    rows_dense,
    split_columns,
    tile_for,
    waves,
)
from oodkern.triton_kernels._rows import filling_rows, gradient_rows, reciprocal_norms, scale_rows
from oodkern.triton_kernels.contrast_kernels import (
    contrast_gradient_kernel,
    contrast_kernel,
    merge_parts_kernel,
    sum_by_target_kernel,
)

BLOCK = 256
"""Columns of a program that merges."""

COLUMN_PARTS = 16 * 2**20
"""Bytes of the columns' parts that a block of rows may write."""

LN2 = math.log(2)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    target: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    temperature: Tensor,
    normalize: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = rows_dense(queries), rows_dense(keys)
    (N, D), M = queries.shape, len(keys)
    own, label, count, column_count = _positives(target, query_labels, key_labels, M)
    labelled = target is None
    reciprocal, key_reciprocal = _reciprocals(queries, keys, normalize)
    tile = tile_for("contrast", queries, M, queries, keys)
    described = operand(keys, tile.classes, tile)
    lse2, picked = (queries.new_empty(N, dtype=torch.float32) for _ in range(2))
    # A tile of rows makes one part of the columns; the first part is the state of the columns so far.
    planes = 3 if labelled else 2
    block_tiles = triton.cdiv(max(N, 1), tile.rows)
    if symmetric:
        block_tiles = min(max(COLUMN_PARTS // (4 * planes * max(M, 1)), 1), block_tiles)
    columns = queries.new_empty((1 + block_tiles, planes, M) if symmetric else (1, 0), dtype=torch.float32)
    column_lse2 = queries.new_full((M if symmetric else 0,), -math.inf, dtype=torch.float32)
    if symmetric:
        columns[0].zero_()
        columns[0, 0].fill_(-math.inf)
    for begin in range(0, N, block_tiles * tile.rows):
        end = min(begin + block_tiles * tile.rows, N)
        row_tiles = triton.cdiv(end - begin, tile.rows)
        splits, split_keys = split_columns(row_tiles, max(M, 1), tile.classes)
        rows = queries.new_empty((splits, 3, end - begin), dtype=torch.float32)
        launch(
            contrast_kernel,
            (row_tiles, splits),
            *(operand(queries[begin:end], tile.rows, tile), described),
            *(reciprocal[begin:end], key_reciprocal, temperature),
            *(own[begin:end], label, rows, columns[1:]),
            *(end - begin, M, D, queries.stride(0), keys.stride(0), split_keys),
            NORMALIZE=normalize,
            LABELS=labelled,
            SYMMETRIC=symmetric,
            **tile.constants(),
        )
        _merge(rows, lse2[begin:end], positive=True)
        picked[begin:end] = rows[0, 2]
        if symmetric:
            _merge(columns[: 1 + row_tiles], column_lse2, positive=labelled)
    if target is not None:
        loss = lse2 - picked
        if symmetric:
            loss = (lse2 + column_lse2[target.clamp(0, max(M - 1, 0))]) / 2 - picked
        loss = torch.where((target >= 0) & (target < M), loss, math.nan)  # as a GPU cannot raise here
    else:
        loss = _mean_positive_loss(lse2, picked, count)
        if symmetric:
            loss = (loss + _mean_positive_loss(column_lse2, columns[0, 2], column_count)) / 2
    return loss * LN2, lse2 * LN2, column_lse2 * LN2


def info_nce_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    target: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    temperature: Tensor,
    query_lse: Tensor,
    key_lse: Tensor,
    normalize: bool,
    symmetric: bool,
    for_queries: bool,
    for_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = rows_dense(queries), rows_dense(keys)
    (N, D), M = queries.shape, len(keys)
    own, label, count, column_count = _positives(target, query_labels, key_labels, M)
    labelled = target is None
    reciprocal, key_reciprocal = _reciprocals(queries, keys, normalize)
    weight, column_weight, hit, column_hit = _weights(grad, own, count, column_count, labelled, symmetric, M)
    scale = _scales(weight, column_weight, hit, column_hit)
    # E^T Y with rows Y_i = 2^(e - e_i) q_i, of which none is larger than q_i.
    common = scale.amin() if N else scale.new_ones(())
    queries_gradient = queries.new_empty((N, D) if for_queries else 0)
    keys_gradient = keys.new_empty((M, D) if for_keys else 0)
    total = keys.new_zeros((M, D) if for_keys else 0, dtype=torch.float32)
    unit_keys = scale_rows(keys, key_reciprocal) if normalize and for_queries else keys
    slope = torch.zeros((), dtype=torch.float64, device=queries.device)
    tile = tile_for("contrast_gradient", queries, M, queries, keys)
    described = operand(keys, tile.classes, tile)
    store = for_queries or for_keys
    for begin, end in waves(N, (M + D) * queries.element_size() + 4 * D, filling_rows(D)):
        wave = queries[begin:end]
        row_tiles, key_tiles = triton.cdiv(end - begin, tile.rows), triton.cdiv(M, tile.classes)
        slopes = queries.new_empty((key_tiles, end - begin), dtype=torch.float32)
        products = queries.new_empty((end - begin, M) if store else (1, 0))
        launch(
            contrast_gradient_kernel,
            (row_tiles * key_tiles,),
            *(operand(wave, tile.rows, tile), described),
            *(reciprocal[begin:end], key_reciprocal, temperature, own[begin:end], label),
            *(
                query_lse[begin:end].contiguous(),
                key_lse.contiguous(),
                weight[begin:end],
                column_weight,
                hit[begin:end],
                column_hit,
            ),
            *(scale[begin:end], products, slopes, end - begin, M, D, queries.stride(0), keys.stride(0)),
            NORMALIZE=normalize,
            LABELS=labelled,
            SYMMETRIC=symmetric,
            STORE=store,
            **tile.constants(),
        )
        slope += slopes.sum(dtype=torch.float64)
        if for_queries:
            factor = _factor(reciprocal[begin:end], normalize, temperature * scale[begin:end])
            v = product(products, unit_keys)
            gradient_rows(v, wave, reciprocal[begin:end], factor, queries_gradient[begin:end], tangent=normalize)
        if for_keys:
            share = common / scale[begin:end]
            y = scale_rows(wave, share * reciprocal[begin:end] if normalize else share)
            add_product(total, products.T, y)
    if for_keys:
        factor = _factor(key_reciprocal, normalize, (temperature * common).expand(M))
        gradient_rows(total, keys, key_reciprocal, factor, keys_gradient, tangent=normalize)
    return queries_gradient, keys_gradient, (-slope / temperature).float()


def _positives(
    target: Tensor | None, query_labels: Tensor | None, key_labels: Tensor | None, M: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which keys are whose positives: (own [N], label [M], positives of each query [N], of each key [M]), int32.

    A label is told by its place among the sorted labels of keys, -1 for one that no key has: 32 bits are compared in
    half the time of 64, and nothing waits for the GPU. With a target, own is that, -1 where it is no key.
    """
    if target is not None:
        own = torch.where((target >= 0) & (target < M), target, -1).int()
        return own, own, own, own
    assert query_labels is not None
    assert key_labels is not None
    query_labels, key_labels = query_labels.contiguous(), key_labels.contiguous()
    queries, keys = query_labels.sort().values, key_labels.sort().values
    count, column_count = (
        torch.searchsorted(there, here, right=True, out_int32=True) - torch.searchsorted(there, here, out_int32=True)
        for there, here in ((keys, query_labels), (queries, key_labels))
    )
    own, label = (torch.searchsorted(keys, labels, out_int32=True) for labels in (query_labels, key_labels))
    return torch.where(count > 0, own, -1), label, count, column_count


def _reciprocals(queries: Tensor, keys: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Reciprocal norms of queries and keys; tensors that are not read where rows are not normalised."""
    if normalize:
        return reciprocal_norms(queries), reciprocal_norms(keys)
    return queries.new_empty(len(queries), dtype=torch.float32), queries.new_empty(0, dtype=torch.float32)


def _factor(reciprocal: Tensor, normalize: bool, divisor: Tensor) -> Tensor:
    return reciprocal / divisor if normalize else 1.0 / divisor


def _weights(
    grad: Tensor, own: Tensor, count: Tensor, column_count: Tensor, labelled: bool, symmetric: bool, M: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a_i, b_j, and what is subtracted at positives, by row and by column; without elements where not read."""
    unread = grad.new_empty(0)
    grad = grad.contiguous()
    half = grad / 2 if symmetric else grad
    if not labelled:
        return half, _sum_by_target(own, half, M) if symmetric else unread, grad, unread
    weight = torch.where(count > 0, half, 0.0)
    if not symmetric:
        return weight, unread, weight / count.clamp_min(1), unread
    column_weight = torch.where(column_count > 0, half, 0.0)
    return weight, column_weight, weight / count.clamp_min(1), column_weight / column_count.clamp_min(1)


def _scales(weight: Tensor, column_weight: Tensor, hit: Tensor, column_hit: Tensor) -> Tensor:
    """2^e_i [N], which bring |a_i| + |hit_i| + max_j (|b_j| + |hit_j|), a bound of |G_ij|, to [2^13, 2^14)."""
    bound = weight.abs() + hit.abs()
    for column in (column_weight, column_hit):
        if column.numel():
            bound = bound + column.abs().nan_to_num(0.0, 0.0).amax()
    bound = bound.nan_to_num(0.0, 0.0)
    if bound.numel():  # a row of zeros takes the smallest scale: no other row is made smaller for it
        bound = torch.where(bound > 0, bound, bound.amax())
    floor = (bound.view(torch.int32) & 0x7F800000).view(torch.float32)
    return 2.0**13 / floor.clamp_min(2.0**-100)


def _mean_positive_loss(lse2: Tensor, picked: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, lse2 - picked / count.clamp_min(1), 0.0)


def _merge(parts: Tensor, lse2: Tensor, positive: bool) -> None:
    """Merges parts [parts, planes, count] into the first, in their order, and writes its logsumexp in powers of two."""
    count = parts.shape[2]
    grid = (triton.cdiv(count, BLOCK),)
    launch(merge_parts_kernel, grid, parts, lse2, len(parts), count, POSITIVE=positive, BLOCK=BLOCK, num_warps=4)


def _sum_by_target(target: Tensor, value: Tensor, M: int) -> Tensor:
    """The sum of value_i over the i whose target is j, [M] float32, in a fixed order."""
    out = value.new_empty(M)
    constants = {"ROWS": 128, "COLUMNS": 32, "num_warps": 4}
    launch(sum_by_target_kernel, (triton.cdiv(M, 32),), target, value, out, len(target), M, **constants)
    return out
