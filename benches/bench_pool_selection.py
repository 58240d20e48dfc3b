"""GReg+'s choice of a pool against scikit-learn and NumPy: `pytest benches/bench_pool_selection.py`.

Ours is all of it, from a mapped float16 file: clusters, assignment, energies, ends. Theirs is given the unit features
in float32 beside that file, and has no norms to form.
"""

import functools

import numpy as np
import pytest
import torch
from bench_pool import FOLDER, D, file_of, folder  # noqa: F401, a fixture
from runner import contests
from sklearn.cluster import KMeans, MiniBatchKMeans

from oodkern.benchmarks.case import OURS, Case, Contender, case
from oodkern.pools import CHUNK_ROWS, FeatureStore, GRegPlus, assign, minibatch_kmeans

CLASSES, CLUSTERS = 100, 64
GROUPS, KMEANS_SAMPLE = 300, 20_000
MINIBATCH, KMEANS = "MiniBatchKMeans + NumPy", "KMeans of 20,000 + NumPy"


class Candidates:
    """A store of blobs and noise, its unit features in float32 (theirs alone need them), and a head."""

    def __init__(self, path, head):
        self.path, self.head = path, head
        self.store, self.features = FeatureStore.open(path), np.load(path, mmap_mode="r")

    def unit(self):
        """In a file beside it, made once."""
        unit = self.path.with_suffix(".unit.npy")
        if not unit.exists():
            x = self.features.astype(np.float32)
            part = unit.with_suffix(".part")
            with open(part, "wb") as file:
                np.save(file, x / np.linalg.norm(x, axis=1, keepdims=True))
            part.rename(unit)
        return np.load(unit, mmap_mode="r")


def blobs(middle, rows, generator):
    chosen = middle[torch.randint(len(middle), (rows,), generator=generator)]
    return chosen + 0.7 * torch.randn(chosen.shape, generator=generator)


def candidates(place, N, D, generator):
    middle = torch.randn(GROUPS, D, generator=generator)
    head = torch.randn(CLASSES, D, generator=generator) / D**0.5, torch.randn(CLASSES, generator=generator)
    return (Candidates(file_of(place, "blobs", N, D, functools.partial(blobs, middle), generator), head),)


def energies(features, head):
    weight, bias = (one.numpy() for one in head)
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), CHUNK_ROWS):
        logits = features[start : start + CHUNK_ROWS].astype(np.float32) @ weight.T + bias
        most = logits.max(1, keepdims=True)
        found[start : start + CHUNK_ROWS] = -(most[:, 0] + np.log(np.exp(logits - most).sum(1)))
    return found


def recipe(labels, energy, clusters, count, seed=0):
    """As many from each end of each cluster, and at random what clusters lack."""
    chosen = []
    for sign in (1, -1):
        for c in range(clusters):
            members = np.flatnonzero(labels == c)
            quota = count // 2 // clusters + (c < count // 2 % clusters)
            ends = np.argpartition(sign * energy[members], quota - 1)[:quota] if quota < len(members) else slice(None)
            chosen.append(members[ends])
    index = np.unique(np.concatenate(chosen))
    rest = np.setdiff1d(np.arange(len(labels)), index)
    return np.concatenate([index, np.random.default_rng(seed).choice(rest, count - len(index), replace=False)])


def of_batches(unit, clusters):
    found = MiniBatchKMeans(clusters, random_state=0).fit(unit)
    return found.labels_, found.cluster_centers_


def of_a_sample(unit, clusters):
    rows = np.random.default_rng(0).choice(len(unit), min(KMEANS_SAMPLE, len(unit)), replace=False)
    found = KMeans(clusters, n_init=1, random_state=0).fit(unit[rows])
    return found.predict(unit), found.cluster_centers_


def clusters_and_count(candidates):
    """64 clusters; one of a hundred candidates is chosen, or two a cluster."""
    clusters = min(CLUSTERS, len(candidates.store) // 6)
    return clusters, max(len(candidates.store) // 100, 2 * clusters)


def our_choice(candidates):
    clusters, count = clusters_and_count(candidates)
    generator = torch.Generator().manual_seed(0)
    index = GRegPlus(clusters).select(candidates.store, candidates.head, count, generator)
    return index, None


def their_choice(cluster, candidates):
    clusters, count = clusters_and_count(candidates)
    labels, centers = cluster(candidates.unit(), clusters)
    index = recipe(labels, energies(candidates.features, candidates.head), clusters, count)
    return torch.from_numpy(index), torch.from_numpy(centers)


def excess(result, inputs):
    """Inertia of all above that of clusters of a sample; so many are chosen as were asked for."""
    (candidates,) = inputs
    index, centers = result
    clusters, count = clusters_and_count(candidates)
    assert len(index.unique()) == len(index) == count
    if centers is None:  # what `select` found
        centers = minibatch_kmeans(candidates.store, clusters, torch.Generator().manual_seed(0))
    sample = torch.from_numpy(of_a_sample(candidates.unit(), clusters)[1])
    return float(assign(candidates.store, centers).inertia / assign(candidates.store, sample).inertia) - 1


@case
def selection(*, place: str, N: int, D: int, other: str, target: float | None = None) -> Case:
    cluster = {MINIBATCH: of_batches, KMEANS: of_a_sample}[other]
    return Case(
        room="pool",
        title=f"GReg+ chooses of a pool, {other} (error: inertia above that of a sample's clusters)",
        sizes={"N": N, "D": D},
        dtype="float16",
        passes="whole",
        inputs=functools.partial(candidates, place, N, D),
        contenders={OURS: Contender(our_choice), other: Contender(functools.partial(their_choice, cluster))},
        error=excess,
        slack=0.02,
        base=other,
        target=target,
    )


SELECTION = [
    selection(place=str(FOLDER), N=60_000, D=D, other=MINIBATCH),
    selection(place=str(FOLDER), N=120_000, D=D, other=KMEANS, target=1.5),
]
# MiniBatchKMeans grows faster than its input: what was aimed for is of a million.
FULL = [selection(place=str(FOLDER), N=1_000_000, D=D, other=MINIBATCH, target=15)]

test_selection = contests(SELECTION)
test_selection_full = pytest.mark.full(contests(FULL))
