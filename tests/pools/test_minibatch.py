"""k-means of a pool from batches: scikit-learn's inertia, scikit-learn's assignment."""

import pytest
import torch
from groups import blobs, seeded, sphere
from pools_of_scores import sharded
from sklearn.cluster import KMeans

from oodkern.pools import minibatch
from oodkern.pools.minibatch import assign, minibatch_kmeans
from oodkern.pools.store import FeatureStore
from oodkern.processes import Processes
from oodkern.reference import unit


def inertia_of(x, centers):
    return float(torch.cdist(x.double(), centers.double()).square().min(1).values.sum())


POOLS = {
    "more blobs than clusters": (lambda: blobs(20_000, 24, 100, 0), 32),
    "as many blobs as clusters": (lambda: blobs(20_000, 24, 16, 1), 16),
    "sphere": (lambda: sphere(20_000, 16, 2), 32),
}
first, OTHERS = next(iter(POOLS)), (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("pool", "dtype"), [*((name, torch.float16) for name in POOLS), *((first, dtype) for dtype in OTHERS)]
)
def test_inertia_is_that_of_scikit_learn(pool, dtype):
    features, clusters = POOLS[pool][0](), POOLS[pool][1]
    store = FeatureStore.of(features.to(dtype))
    x = unit(features.to(dtype).float())
    oracle = KMeans(clusters, n_init=3, random_state=0).fit(x.numpy())
    centers = minibatch_kmeans(store, clusters, seeded())
    assert (centers.dtype, centers.shape) == (torch.float32, (clusters, features.shape[1]))
    found = assign(store, centers)
    assert found.inertia <= 1.02 * oracle.inertia_
    assert found.inertia == pytest.approx(inertia_of(x, centers), rel=1e-4)


def test_not_normalized():
    features = 5 + blobs(20_000, 8, 60, 3)
    store = FeatureStore.of(features)
    oracle = KMeans(24, n_init=3, random_state=0).fit(features.numpy())
    centers = minibatch_kmeans(store, 24, seeded(), normalize=False)
    assert assign(store, centers, normalize=False).inertia <= 1.02 * oracle.inertia_


def test_small_pools_are_clustered_whole():
    features = blobs(500, 8, 20, 0)
    centers = minibatch_kmeans(FeatureStore.of(features), 20, seeded())
    oracle = KMeans(20, n_init=10, random_state=0).fit(unit(features).numpy())
    assert inertia_of(unit(features), centers) <= 1.02 * oracle.inertia_
    whole = minibatch_kmeans(FeatureStore.of(features[:20]), 20, seeded())  # a center for every row
    assert inertia_of(unit(features[:20]), whole) < 1e-9


def test_assignment_is_that_of_all_distances():
    features, centers = blobs(3000, 12, 30, 5).half(), torch.randn(17, 12)
    found = assign(FeatureStore.of(features), centers)
    distance = torch.cdist(unit(features.double()), centers.double()).square()
    assert found.index.dtype == torch.int32
    own = distance.gather(1, found.index.long()[:, None])[:, 0]
    assert torch.allclose(own, distance.min(1).values, atol=1e-6)
    assert found.inertia == pytest.approx(float(own.sum()), rel=1e-6)


def test_seeds():
    store = FeatureStore.of(blobs(20_000, 8, 60, 0).half())
    first, again, other = (minibatch_kmeans(store, 24, seeded(seed)) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_rows_that_are_not_finite_are_passed_over():
    features = blobs(12_000, 8, 60, 0)
    bad = torch.arange(0, 12_000, 7)
    features[bad] = torch.nan
    features[bad[::2], 0] = torch.inf
    centers = minibatch_kmeans(FeatureStore.of(features), 24, seeded())
    good = unit(features[features.isfinite().all(1)])
    oracle = KMeans(24, n_init=3, random_state=0).fit(good.numpy())
    found = assign(FeatureStore.of(features), centers)
    assert found.inertia == pytest.approx(inertia_of(good, centers), rel=1e-4)
    assert found.inertia <= 1.02 * oracle.inertia_
    assert set(found.index.tolist()) <= set(range(24))


def test_fewer_distinct_rows_than_clusters():
    corners = torch.eye(5)
    store = FeatureStore.of(corners[torch.randint(5, (20_000,), generator=seeded())])
    centers = minibatch_kmeans(store, 9, seeded())
    assert centers.isfinite().all()
    assert assign(store, centers).inertia < 1e-6


def test_lost_centers_go_on_from_the_farthest_rows():
    x = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    centers, distance = torch.tensor([[0.0], [100.0], [200.0]]), torch.tensor([0.0, 1.0, 25.0, 81.0])
    lost = torch.tensor([False, True, True])
    assert minibatch._refilled(centers, lost, x, distance).tolist() == [[0.0], [9.0], [5.0]]
    assert minibatch._refilled(centers, lost, x[:2], distance[:2]).tolist() == [[0.0], [1.0], [200.0]]
    assert minibatch._refilled(centers, ~lost, x, torch.zeros(4)).equal(centers)


@pytest.mark.parametrize(("steps", "batch"), [(0, 64), (3, 64), (8, 100_000)])
def test_steps_and_batches(steps, batch, monkeypatch):
    """More steps are no worse, and batches end at the whole pool."""
    sizes = []
    nearest = minibatch.nearest_center
    monkeypatch.setattr(minibatch, "nearest_center", lambda x, centers: (sizes.append(len(x)), nearest(x, centers))[1])
    store = FeatureStore.of(blobs(12_000, 8, 60, 0))
    minibatch_kmeans(store, 24, seeded(), steps=steps, batch=batch, tolerance=0)
    assert sizes == [min(int(batch * 1.4**step), 12_000) for step in range(steps)]


def test_ends_where_nothing_is_gained(monkeypatch):
    sizes = []
    nearest = minibatch.nearest_center
    monkeypatch.setattr(minibatch, "nearest_center", lambda x, centers: (sizes.append(len(x)), nearest(x, centers))[1])
    store = FeatureStore.of(blobs(12_000, 8, 3, 0))
    minibatch_kmeans(store, 3, seeded(), steps=50, batch=12_000)
    assert 2 <= len(sizes) < 12


class Half(Processes):
    """One of two processes, without the other: the sums are its own."""

    def gather(self, rows):
        return rows

    def sum(self, values):
        return values


def test_processes_take_shares():
    features, centers = blobs(1001, 12, 30, 5).half(), torch.randn(17, 12)
    store = FeatureStore.of(features)
    whole, halves = assign(store, centers), [assign(store, centers, processes=Half(rank, 2)) for rank in (0, 1)]
    assert torch.cat([half.index for half in halves]).equal(whole.index)
    assert sum(half.inertia for half in halves) == pytest.approx(whole.inertia, rel=1e-12)


def test_several_shards(tmp_path):
    features = blobs(12_000, 8, 60, 0).half()
    memory, file = FeatureStore.of(features), sharded(tmp_path / "pool", features, 5000)
    subset = file.subset(torch.arange(12_000))
    centers = [minibatch_kmeans(store, 24, seeded()) for store in (memory, file, subset)]
    assert centers[0].equal(centers[1])
    assert centers[0].equal(centers[2])
    found = assign(memory, centers[0])
    for store in (file, subset):
        again = assign(store, centers[0])
        assert again.index.equal(found.index)
        assert again.inertia == pytest.approx(found.inertia, rel=1e-6)


def test_errors():
    store = FeatureStore.of(torch.randn(10, 4))
    with pytest.raises(ValueError, match=r"^clusters: expected at most 10, the number of samples, got 11$"):
        minibatch_kmeans(store, 11, seeded())
    with pytest.raises(ValueError, match=r"^clusters: expected 1 or more, got 0$"):
        minibatch_kmeans(store, 0, seeded())
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator, got int$"):
        minibatch_kmeans(store, 2, 0)
    with pytest.raises(ValueError, match=r"^batch: expected 1 or more, got 0$"):
        minibatch_kmeans(store, 2, seeded(), batch=0)
    with pytest.raises(ValueError, match=r"^seeds_from: expected 5 or more, got 4$"):
        minibatch_kmeans(store, 5, seeded(), seeds_from=4)
    with pytest.raises(ValueError, match=r"^features: expected 3 finite rows of [\d,]+ at least, got 0$"):
        minibatch_kmeans(FeatureStore.of(torch.full((10, 4), torch.nan)), 3, seeded())
