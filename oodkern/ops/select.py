"""Room `select`: assignment to centers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._checks import score_dtype
from oodkern.ops._product import check_beside, check_matrix, raw, register_fake


class NearestCenter(NamedTuple):
    """index [N] int64 and squared_distance [N]."""

    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    squared_distance: Tensor


@torch.no_grad()
def nearest_center(features: Tensor, centers: Tensor) -> NearestCenter:
    """The nearest of the centers to each row, argmin_k |x - c_k|^2, and the squared distance to it.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        centers: [K, D], K >= 1, in the dtype of the features.

    Returns:
        `NearestCenter(index, squared_distance)`, each [N]: int64, the lowest index where several are nearest, and
        float32 (float64 for float64 features). Centers are compared by x . c - |c|^2 / 2, in float32 at least, so
        two whose distances agree to rounding of |x| |c| may change places; the distance itself is then formed as
        sum (x - c)^2, which does not cancel.

    Not differentiable. Raises TypeError or ValueError for an argument of the wrong kind or shape.
    """
    check_matrix(features, "features")
    check_matrix(centers, "centers", "K, D")
    if centers.shape[1] != features.shape[1] or len(centers) == 0:
        raise ValueError(
            f"centers: expected [K, {features.shape[1]}] with K >= 1 as features are, got {list(centers.shape)}"
        )
    check_beside(centers, "centers", features, "features")
    backend = backend_for("select", features, len(centers))
    if backend == "reference":
        return NearestCenter(*reference.nearest_center(features, centers))
    return NearestCenter(*raw(backend, "nearest_center", features, centers))


def _fake_nearest(features: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    rows = features.shape[0]
    return features.new_empty(rows, dtype=torch.int64), features.new_empty(rows, dtype=score_dtype(features))


register_fake("nearest_center", _fake_nearest)
