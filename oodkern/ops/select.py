"""Room `select`: assignment to centers, extremes of clusters. (The streaming top-k is in `top_k`.)"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._checks import INTEGERS, check_count, check_floating, check_tensor, score_dtype
from oodkern.ops._product import check_beside, check_matrix, mixed_backend, raw, register_fake


class NearestCenter(NamedTuple):
    """index [N] int64 and squared_distance [N]."""

    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    squared_distance: Tensor


@torch.no_grad()
def nearest_center(features: Tensor, centers: Tensor, normalize: bool = False) -> NearestCenter:
    """The nearest of the centers to each row, argmin_k |x - c_k|^2, and the squared distance to it.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        centers: [K, D], K >= 1, in the dtype of the features, or float32 beside 16-bit features.
        normalize: whether rows of features count as x / |x|; a row of zeros stays one.

    Returns:
        `NearestCenter(index, squared_distance)`, each [N]: int64, the lowest index where several are nearest, and
        float32 (float64 for float64 features). Centers are compared by x . c - |c|^2 / 2, in float32 at least, so
        two whose distances agree to rounding of |x| |c| may change places; the distance itself is then formed as
        sum (x - c)^2, which does not cancel.

    The CPU's kernels read features as they are: of float32 centers and of normalize no copy is made. Not
    differentiable. Raises TypeError or ValueError for an argument of the wrong kind or shape.
    """
    check_matrix(features, "features")
    check_matrix(centers, "centers", "K, D")
    if centers.shape[1] != features.shape[1] or len(centers) == 0:
        raise ValueError(
            f"centers: expected [K, {features.shape[1]}] with K >= 1 as features are, got {list(centers.shape)}"
        )
    check_beside(centers, "centers", features, "features", or_float32=True)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected True or False, got {type(normalize).__name__}")
    backend, features, centers, _ = mixed_backend("select", features, centers, widened=normalize)
    if backend == "reference":
        return NearestCenter(*reference.nearest_center(features, centers, normalize))
    if normalize and (backend != "native" or features.device.type != "cpu"):
        features, normalize = reference.unit(features), False
    return NearestCenter(*raw(backend, "nearest_center", features, centers, normalize))


class ClusterExtremes(NamedTuple):
    """lowest and highest, each [clusters, per_side] int64."""

    lowest: Tensor
    highest: Tensor


@torch.no_grad()
def cluster_extremes(score: Tensor, cluster: Tensor, clusters: int, per_side: int = 1) -> ClusterExtremes:
    """The samples of lowest and of highest score in each cluster, as indices into `score`.

    Args:
        score: [N], float64, float32, bfloat16 or float16.
        cluster: [N], integers in 0..clusters-1, the cluster of each sample.
        clusters: how many clusters there are.
        per_side: how many samples of each end.

    Returns:
        `ClusterExtremes(lowest, highest)`, each [clusters, per_side] int64: the lowest first and the highest first, of
        equal scores the lower index first; -1 where a cluster has fewer members. A cluster with fewer than
        2 per_side members has some of them on both sides. A NaN is no score: its sample is never among the extremes.

    One pass and no sort: O(N log per_side) on the CPU; on a GPU a pass for each of per_side, or a sort where it is more
    than 32 and scores are not float64. Not differentiable. Raises TypeError or ValueError for an argument of the wrong
    kind or shape, or for a cluster out of range where that is seen without waiting for a device (on the CPU); the
    kernels of a GPU pass over such a sample.

    Source: the sampling of GReg+, which takes the outliers of lowest and of highest energy from each cluster.
    """
    check_floating(score, "score")
    if score.dim() != 1:
        raise ValueError(f"score: expected [N], one number a sample, got {list(score.shape)}")
    check_tensor(cluster, "cluster")
    if cluster.dtype not in INTEGERS:
        raise TypeError(f"cluster: expected integers, got {str(cluster.dtype).removeprefix('torch.')}")
    if cluster.shape != score.shape:
        raise ValueError(f"cluster: expected {list(score.shape)} as score is, got {list(cluster.shape)}")
    check_beside(cluster, "cluster", score, "score", dtype=False)
    check_count(clusters, "clusters", 0)
    check_count(per_side, "per_side", 1)
    if len(cluster) and cluster.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in cluster.aminmax())
        if low < 0 or high >= clusters:
            raise ValueError(f"cluster: expected 0..{clusters - 1}, got {low if low < 0 else high}")
    score, cluster = reference.widen(score), cluster.long()
    backend = backend_for("extremes", score, 0)
    if backend == "reference":
        return ClusterExtremes(*reference.cluster_extremes(score, cluster, clusters, per_side))
    return ClusterExtremes(*raw(backend, "cluster_extremes", score, cluster, clusters, per_side))


def _fake_nearest(features: Tensor, centers: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor]:
    rows = features.shape[0]
    return features.new_empty(rows, dtype=torch.int64), features.new_empty(rows, dtype=score_dtype(features))


register_fake("nearest_center", _fake_nearest)


def _fake_extremes(score: Tensor, cluster: Tensor, clusters: int, per_side: int) -> tuple[Tensor, Tensor]:
    lowest, highest = (score.new_empty((clusters, per_side), dtype=torch.int64) for _ in range(2))
    return lowest, highest


register_fake("cluster_extremes", _fake_extremes)
