"""Room `select`: the best of a stream, extremes of clusters, nearest centers. Nothing has a gradient."""

from __future__ import annotations

import functools

import torch

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal

STREAM_CHUNK = 65_536
CENTER_ROWS = {"cpu": 512, "cuda": 65_536}
SCATTER_ROWS = {"cpu": 1 << 16, "cuda": 1 << 24}
JUDGED_ROWS = 4_096


def our_top_k(chunk, k, scores):
    top = oodkern.TopK(k)
    for offset in range(0, len(scores), chunk):
        top.update(scores[offset : offset + chunk], offset)
    return tuple(top.result())


def eager_top_k(k, scores):
    return tuple(torch.topk(scores, k))


def chunked_top_k(k, scores):
    """What a scan does by hand: the best of the chunk beside the best so far."""
    values, indices = scores.new_empty(0), torch.empty(0, dtype=torch.int64, device=scores.device)
    for offset in range(0, len(scores), STREAM_CHUNK):
        chunk = scores[offset : offset + STREAM_CHUNK]
        best = torch.topk(chunk, min(k, len(chunk)))
        values, place = torch.topk(torch.cat([values, best.values]), min(k, len(values) + len(best.values)))
        indices = torch.cat([indices, best.indices + offset])[place]
    return values, indices


def top_k_error(k, result, inputs):
    """Of values against those of a sort, and of what lies at the indices; equal scores may change places."""
    (scores,), (values, indices) = inputs, result
    exact = scores.sort(descending=True).values[:k]
    return float((values - exact).abs().max() + (scores[indices] - exact).abs().max())


def scores_alone(N, generator):
    return (random_normal(generator, (N,), "float32"),)


@case
def top_k(*, N: int, k: int) -> Case:
    return Case(
        room="select",
        title="top k",
        sizes={"N": N, "k": k},
        dtype="float32",
        passes="forward",
        inputs=functools.partial(scores_alone, N),
        contenders={
            OURS: Contender(functools.partial(our_top_k, STREAM_CHUNK, k)),
            "oodkern, one chunk": Contender(functools.partial(our_top_k, N, k)),
            "eager": Contender(functools.partial(eager_top_k, k)),
            COMPILED: Contender(functools.partial(eager_top_k, k), compiled=True),
            "chunked": Contender(functools.partial(chunked_top_k, k)),
        },
        error=functools.partial(top_k_error, k),
        slack=0.0,
        bytes=bytes_of((N,), "float32") + 12 * k,
    )


def published_extremes(K, score, cluster):
    """One mask a cluster."""
    lowest, highest = (torch.full((K, 1), -1, device=score.device) for _ in range(2))
    for c in range(K):
        members = (cluster == c).nonzero().squeeze(1)
        if len(members):
            lowest[c], highest[c] = members[score[members].argmin()], members[score[members].argmax()]
    return lowest, highest


def scattered_extremes(K, score, cluster, rows=None):
    """The extreme score of each cluster, then the lowest index that has it; all at once, or so many rows at a time."""
    N = len(score)
    parts = list(zip(score.split(rows or N), cluster.split(rows or N), strict=True))
    place = torch.arange(N, device=score.device).split(rows or N)

    def side(reduce, worst):
        extreme = score.new_full((K,), worst)
        for of, to in parts:
            extreme.scatter_reduce_(0, to, of, reduce)
        found = cluster.new_full((K,), N)
        for (of, to), index in zip(parts, place, strict=True):
            found.scatter_reduce_(0, to, torch.where(of == extreme[to], index, N), "amin")
        return torch.where(found < N, found, -1)[:, None]

    return side("amin", torch.inf), side("amax", -torch.inf)


def chunked_extremes(K, score, cluster):
    return scattered_extremes(K, score, cluster, SCATTER_ROWS[score.device.type])


def scores_and_clusters(N, K, generator):
    return *scores_alone(N, generator), torch.randint(0, K, (N,), generator=generator)


@case
def cluster_extremes(*, N: int, K: int) -> Case:
    eager = functools.partial(scattered_extremes, K)
    return Case(
        room="select",
        title="cluster_extremes, one a side",
        sizes={"N": N, "K": K},
        dtype="float32",
        passes="forward",
        inputs=functools.partial(scores_and_clusters, N, K),
        contenders={
            OURS: Contender(functools.partial(oodkern.cluster_extremes, clusters=K)),
            "published": Contender(functools.partial(published_extremes, K)),
            "eager": Contender(eager),
            "by sorting": Contender(functools.partial(reference.cluster_extremes, clusters=K)),
            COMPILED: Contender(eager, compiled=True),
            "chunked": Contender(functools.partial(chunked_extremes, K)),
        },
        oracle=functools.partial(reference.cluster_extremes, clusters=K),
        slack=0.0,
        bytes=12 * N + 16 * K,
    )


def cdist_nearest(features, centers):
    distance, index = torch.cdist(features, centers).min(-1)
    return index, distance.square()


def eager_nearest(features, centers):
    """argmin |x - c|^2 is argmax x . c - |c|^2 / 2: one product. The distance is formed of the center that is taken."""
    index = torch.addmm(centers.square().sum(-1).mul(-0.5), features, centers.T).argmax(-1)
    return index, (features - centers[index]).square().sum(-1)


def chunked_nearest(features, centers):
    parts = [eager_nearest(rows, centers) for rows in features.split(CENTER_ROWS[features.device.type])]
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def sklearn_nearest(features, centers):
    """Of NumPy's arrays, without copies on a CPU; in float32 it computes in blocks of float64."""
    from sklearn.metrics import pairwise_distances_argmin_min

    arrays = (one.cpu().numpy() for one in (features, centers))
    index, distance = pairwise_distances_argmin_min(*arrays, metric="sqeuclidean")
    return torch.from_numpy(index).to(features.device), torch.from_numpy(distance).to(features.device)


def nearest_error(result, inputs):
    """Of some rows: how far the center that was taken is beyond the nearest, and the distance given from the true one,
    the larger one in units of the largest distance."""
    (index, distance), (features, centers) = result, inputs
    x, c = features[:JUDGED_ROWS].double(), centers.double()
    nearest = (x.square().sum(-1, keepdim=True) - 2 * x @ c.T + c.square().sum(-1)).amin(-1)
    taken = (x - c[index[: len(x)]]).square().sum(-1)
    wrong = torch.maximum(taken - nearest, (distance[: len(x)].double() - taken).abs())
    return float(wrong.max() / nearest.max())


def features_and_centers(N, D, K, dtype, generator):
    return random_normal(generator, (N, D), dtype), random_normal(generator, (K, D), dtype)


@case
def nearest_center(*, N: int, D: int, K: int, dtype: str) -> Case:
    contenders = {
        OURS: Contender(oodkern.nearest_center),
        "eager": Contender(eager_nearest),
        "cdist": Contender(cdist_nearest),
        COMPILED: Contender(eager_nearest, compiled=True),
        "chunked": Contender(chunked_nearest),
    }
    if dtype == "float32":  # NumPy has no bfloat16
        contenders["scikit-learn"] = Contender(sklearn_nearest, needs=("sklearn.metrics",))
    return Case(
        room="select",
        title="nearest_center",
        sizes={"N": N, "D": D, "K": K},
        dtype=dtype,
        passes="forward",
        inputs=functools.partial(features_and_centers, N, D, K, dtype),
        contenders=contenders,
        error=nearest_error,
        flops=2.0 * N * D * K,
        bytes=bytes_of((N, D), dtype) + bytes_of((K, D), dtype) + 12 * N,
    )
