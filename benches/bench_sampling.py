"""A round of GReg+'s choice of outliers against scikit-learn and NumPy: `pytest benches/bench_sampling.py`."""

import functools

import numpy as np
import torch
from runner import contests
from sklearn.cluster import KMeans

from oodkern.benchmarks.case import OURS, Case, Contender, case
from oodkern.pools import cluster_sample, kmeans
from oodkern.reference import unit

CLUSTERS, GROUPS, INNER = 64, 100, 24
RESTARTS = 10  # of the clusters that inertia is compared with


def clusters_and_count(N):
    """64 clusters and 128 of a step's 384 candidates, and of more; fewer of fewer."""
    clusters = min(CLUSTERS, N // 6)
    return clusters, 2 * clusters


def candidates(N, D, generator):
    """Features as of a network: overlapping groups, most of the variance in a few directions, nothing negative."""
    randn = functools.partial(torch.randn, generator=generator)
    group = torch.randint(GROUPS, (N,), generator=generator)
    features = randn(GROUPS, D)[group] / 2 + randn(N, INNER) @ randn(INNER, D) / 4
    return (features + 0.3 * randn(N, D)).relu(), randn(N)


def ours(features, energy, seed=0):
    """Indices, and for the comparison the inertia of the clusters."""
    clusters, count = clusters_and_count(len(features))
    generator = torch.Generator().manual_seed(seed)
    found = kmeans(unit(features), clusters, generator)
    return cluster_sample(None, energy, count, clusters, generator, clustering=found.index), float(found.inertia)


def recipe(features, energy, clusters, count, seed=0):
    """Sort by energy, cluster what is divided by its norms, take both ends of each cluster, fill at random."""
    order = np.argsort(energy.numpy())
    x = features.numpy()[order]
    found = KMeans(clusters, n_init=3, random_state=seed).fit(x / np.linalg.norm(x, axis=1, keepdims=True))
    chosen: dict[int, None] = {}
    per_side = max(count // 2 // clusters, 1)
    for side in (slice(None, per_side), slice(-per_side, None)):
        for c in range(clusters):
            chosen.update(dict.fromkeys(np.flatnonzero(found.labels_ == c)[side].tolist()))
    rest = np.setdiff1d(np.arange(len(x)), list(chosen))
    fill = np.random.default_rng(seed).choice(rest, count - len(chosen), replace=False)
    return torch.from_numpy(order[np.concatenate([list(chosen), fill])]), found.inertia_


def published(features, energy, seed=0):
    return recipe(features, energy, *clusters_and_count(len(features)), seed)


def each(function, *sets):
    """A round over every data set: how many turns k-means takes differs."""
    return [function(*one, seed=seed) for seed, one in enumerate(sets)]


def inputs(sets, N, D, generator):
    return tuple(candidates(N, D, generator) for _ in range(sets))


def excess(result, sets):
    """Mean inertia above that of the best of ten restarts; so many samples are chosen as were asked for."""
    found = 0.0
    for (index, inertia), (features, _) in zip(result, sets, strict=True):
        clusters, count = clusters_and_count(len(features))
        assert len(index.unique()) == len(index) == count
        best = KMeans(clusters, n_init=RESTARTS, random_state=1).fit(unit(features).numpy()).inertia_
        found += (inertia / best - 1) / len(sets)
    return found


@case
def rounds(*, sets: int, N: int, D: int, target: float | None = None) -> Case:
    return Case(
        room="sampling",
        title="a GReg+ round (error: inertia above that of ten restarts)",
        sizes={"sets": sets, "N": N, "D": D},
        dtype="float32",
        passes="whole",
        inputs=functools.partial(inputs, sets, N, D),
        contenders={
            OURS: Contender(functools.partial(each, ours)),
            "published": Contender(functools.partial(each, published)),
        },
        error=excess,
        slack=0.02,
        base="published",
        target=target,
    )


# A step's candidates, and a larger choice of wider features.
CASES = [rounds(sets=10, N=384, D=64, target=5), rounds(sets=1, N=1_230, D=512, target=5)]

test_rounds = contests(CASES)
