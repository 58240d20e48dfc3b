"""Triton kernels of room `select`: centers are compared by x . c - |c|^2 / 2, then the distance to one is formed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from oodkern.triton_kernels._host import launch, operand, rows_dense, split_columns, tile_for
from oodkern.triton_kernels._rows import row_blocks, row_dot
from oodkern.triton_kernels.select_kernels import distance_kernel, nearest_kernel


def nearest_center(features: Tensor, centers: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    if normalize:
        raise ValueError("normalize: expected rows that are normalised already")
    features, centers = rows_dense(features), rows_dense(centers)
    (N, D), K = features.shape, len(centers)
    index = features.new_empty(N, dtype=torch.int64)
    distance = features.new_empty(N, dtype=torch.float32)
    tile = tile_for("nearest_center", features, K, features, centers)
    row_tiles = triton.cdiv(N, tile.rows)
    splits, split_centers = split_columns(row_tiles, K, tile.classes)
    tops = features.new_empty((splits, N), dtype=torch.float32)
    indices = features.new_empty((splits, N), dtype=torch.int32)
    launch(
        nearest_kernel,
        (row_tiles, splits),
        *(operand(features, tile.rows, tile), operand(centers, tile.classes, tile)),
        *(row_dot(centers, centers, 0.5), tops, indices),
        *(N, K, D, features.stride(0), centers.stride(0), split_centers),
        **tile.constants(),
    )
    blocks = row_blocks(D)
    launch(
        distance_kernel,
        (triton.cdiv(N, blocks["BLOCK_N"]),),
        *(features, centers, tops, indices, index, distance),
        *(N, D, splits, features.stride(0), centers.stride(0)),
        **blocks,
        num_warps=4,
    )
    return index, distance
