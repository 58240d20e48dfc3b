"""10,000 of 1,000,000 outliers by GReg+, against scikit-learn and NumPy: `pytest benches/bench_pool_selection.py`.

Ours is all of it, from a mapped float16 file: clusters, assignment, energies, ends. Theirs is given the unit features
in float32 beside that file, and has no norms to form.
"""

import numpy as np
import pytest
import torch
from measure import Row, interleaved_medians, peak_megabytes
from sklearn.cluster import KMeans, MiniBatchKMeans

from oodkern.pools.minibatch import assign, minibatch_kmeans
from oodkern.pools.policies import GRegPlus
from oodkern.pools.store import FeatureStore

N, D, K, CLUSTERS, COUNT = 1_000_000, 128, 100, 64, 10_000
GROUPS, SAMPLE, CHUNK = 300, 20_000, 65_536


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A store of blobs and noise, its unit features in float32, and a head."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(GROUPS, D, generator=generator)
    path = tmp_path_factory.mktemp("pool") / "features.npy"
    file = np.lib.format.open_memmap(path, "w+", np.float16, (N, D))
    unit = np.empty((N, D), np.float32)
    for start in range(0, N, CHUNK):
        n = min(CHUNK, N - start)
        rows = middle[torch.randint(GROUPS, (n,), generator=generator)] + 0.7 * torch.randn(n, D, generator=generator)
        file[start : start + n] = rows.half().numpy()
        x = file[start : start + n].astype(np.float32)
        unit[start : start + n] = x / np.linalg.norm(x, axis=1, keepdims=True)
    file.flush()
    head = torch.randn(K, D, generator=generator) / D**0.5, torch.randn(K, generator=generator)
    return FeatureStore.open(path), np.load(path, mmap_mode="r"), unit, head


def energies(features, head):
    weight, bias = (one.numpy() for one in head)
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), CHUNK):
        logits = features[start : start + CHUNK].astype(np.float32) @ weight.T + bias
        most = logits.max(1, keepdims=True)
        found[start : start + CHUNK] = -(most[:, 0] + np.log(np.exp(logits - most).sum(1)))
    return found


def recipe(labels, energy, seed=0):
    """78 or 79 from each end of each cluster, and at random what clusters lack."""
    chosen = []
    for sign in (1, -1):
        for c in range(CLUSTERS):
            members = np.flatnonzero(labels == c)
            quota = COUNT // 2 // CLUSTERS + (c < COUNT // 2 % CLUSTERS)
            ends = np.argpartition(sign * energy[members], quota - 1)[:quota] if quota < len(members) else slice(None)
            chosen.append(members[ends])
    index = np.unique(np.concatenate(chosen))
    rest = np.setdiff1d(np.arange(len(labels)), index)
    return np.concatenate([index, np.random.default_rng(seed).choice(rest, COUNT - len(index), replace=False)])


def of_batches(unit):
    found = MiniBatchKMeans(CLUSTERS, random_state=0).fit(unit)
    return found.labels_, found.cluster_centers_


def of_a_sample(unit):
    rows = np.random.default_rng(0).choice(len(unit), SAMPLE, replace=False)
    found = KMeans(CLUSTERS, n_init=1, random_state=0).fit(unit[rows])
    return found.predict(unit), found.cluster_centers_


OTHERS = {"MiniBatchKMeans + NumPy": (of_batches, 15, 1), "KMeans of 20,000 + NumPy": (of_a_sample, 1.5, 5)}


@pytest.mark.parametrize("other", OTHERS)
def test_selection(pool, other, benchmark, record, rounds):
    store, features, unit, head = pool
    cluster, target, most_rounds = OTHERS[other]
    centers, index = {}, {}

    def ours():
        index["oodkern"] = GRegPlus(CLUSTERS).select(store, head, COUNT, torch.Generator().manual_seed(0))

    def theirs():
        labels, found = cluster(unit)
        centers[other] = torch.from_numpy(found)
        index[other] = torch.from_numpy(recipe(labels, energies(features, head)))

    contenders = {"oodkern": ours, other: theirs}
    times = interleaved_medians(contenders, min(rounds, most_rounds))
    centers["oodkern"] = minibatch_kmeans(store, CLUSTERS, torch.Generator().manual_seed(0))  # what select found
    inertia = {name: assign(store, found).inertia for name, found in centers.items()}
    row = Row(
        "pools",
        f"GReg+, {COUNT:,} of a pool (error: inertia of all above that of scikit-learn's; its memory is not seen)",
        (N, D, CLUSTERS),
        "float16",
        times,
        {"oodkern": peak_megabytes(ours), other: 0.0},
        {name: inertia[name] / inertia[other] - 1 for name in contenders},
        target=target,
        base=other,
    )
    record(row)
    benchmark.pedantic(ours, rounds=1)
    for found in index.values():
        assert len(found.unique()) == len(found) == COUNT
    assert inertia["oodkern"] <= 1.02 * inertia[other]
    assert row.ratio >= target
