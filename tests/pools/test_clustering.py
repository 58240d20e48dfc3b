"""k-means: scikit-learn's inertia as the oracle, fixed points, and what happens at the edges."""

import warnings

import pytest
import torch
from groups import DATA, begin_with, blobs, seeded, sphere
from sklearn.cluster import KMeans as Oracle
from sklearn.exceptions import ConvergenceWarning

import oodkern
from oodkern.pools import clustering, kmeans


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("data", DATA)
def test_inertia_of_scikit_learn(data):
    """No more than 2 % above it in the mean over data sets; both find local optima, and either may find the lower."""
    ratios = []
    for seed in range(12):
        x, k = DATA[data](seed)
        ours, theirs = kmeans(x, k, seeded(seed)), Oracle(k, n_init=3, random_state=seed).fit(x.double().numpy())
        ratios.append(float(ours.inertia) / theirs.inertia_)
    assert sum(ratios) / len(ratios) < 1.02


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("data", DATA)
def test_fixed_point(data):
    """Each sample is with its nearest center, and each center is the mean of its samples."""
    for seed in range(3):
        x, k = DATA[data](seed)
        centers, index, inertia = kmeans(x, k, seeded(seed), tolerance=0.0, iterations=500)
        assert (centers.dtype, centers.shape) == (torch.float32, (k, x.shape[1]))
        assert (index.dtype, index.shape, inertia.dtype, inertia.shape) == (torch.int64, (len(x),), torch.float32, ())
        distances = (x.double()[:, None] - centers.double()).square().sum(2)
        nearest, slack = distances.amin(1), 1e-5 * distances.amax()
        assert (distances.gather(1, index[:, None])[:, 0] <= nearest + slack).all()
        torch.testing.assert_close(inertia.double(), nearest.sum(), rtol=1e-3, atol=0)
        for c in range(k):
            torch.testing.assert_close(centers[c], x[index == c].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("clusters", [1, 40])
def test_one_cluster_and_one_for_each(clusters):
    x = torch.randn(40, 5)
    centers, index, inertia = kmeans(x, clusters, seeded())
    if clusters == 1:
        assert (index == 0).all()
        torch.testing.assert_close(centers[0], x.mean(0))
        torch.testing.assert_close(inertia, (x - x.mean(0)).square().sum())
    else:
        assert index.sort().values.tolist() == list(range(40))
        torch.testing.assert_close(centers[index], x)
        assert inertia < 1e-9


@pytest.mark.usefixtures("way")
def test_duplicates():
    """Of 7 distinct samples, each many times: as many clusters, fewer, and more."""
    distinct = torch.randn(7, 16) + 3
    x = distinct.repeat(30, 1)[torch.randperm(210, generator=seeded())]
    for clusters in (7, 12):
        centers, index, inertia = kmeans(x, clusters, seeded())
        assert inertia < 1e-8 * x.square().sum()
        torch.testing.assert_close(centers[index], x)
        assert centers.isfinite().all()
        assert torch.cdist(centers, distinct).amin(1).max() < 1e-4  # the ones to spare too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        oracle = min(Oracle(4, n_init=10, random_state=seed).fit(x.numpy()).inertia_ for seed in range(3))
    assert float(kmeans(x, 4, seeded(), restarts=30).inertia) == pytest.approx(oracle, rel=1e-4)
    alike = torch.ones(20, 3)
    assert kmeans(alike, 3, seeded()).inertia == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("clusters", [2, 5])
def test_a_lost_cluster_goes_on_from_the_farthest_sample(monkeypatch, clusters):
    """All seeds are one sample, so all clusters but one are lost at once."""
    begin_with(monkeypatch, torch.zeros(clusters).long())
    x = torch.cat([torch.randn(10, 4) * 0.1, torch.randn(10, 4) * 0.1 + 9])
    index = kmeans(x, clusters, seeded(), restarts=2).index
    assert len(set(index.tolist())) == clusters
    assert not set(index[:10].tolist()) & set(index[10:].tolist())


def test_refill_takes_the_farthest_that_can_go():
    label = torch.tensor([[0, 0, 0, 2, 0], [1, 1, 1, 1, 1]])
    distance = torch.tensor([[1.0, 3.0, 2.0, 9.0, 0.0], [0.0, 0.0, 4.0, 0.0, 0.0]])
    count = torch.tensor([[4, 0, 1, 0], [0, 5, 0, 0]])
    # The only member of cluster 2 stays. In the second restart one sample alone is apart from its center.
    refilled = clustering._refill(label, distance, count)
    assert refilled.tolist() == [[0, 1, 3, 2, 0], [1, 1, 0, 1, 1]]
    assert label.tolist() == [[0, 0, 0, 2, 0], [1, 1, 1, 1, 1]]


@pytest.mark.usefixtures("way")
def test_the_generator_alone_decides():
    x = blobs(300, 8, 40, 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = kmeans(x, 20, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    for one, other in zip(first, kmeans(x, 20, seeded(1)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.centers, kmeans(x, 20, seeded(2)).centers)
    generator = seeded(1)
    kmeans(x, 20, generator)
    assert not torch.equal(first.centers, kmeans(x, 20, generator).centers)  # it has moved on


@pytest.mark.usefixtures("way")
def test_restarts_and_iterations():
    """More of either is no worse; and a restart is one and the same whatever runs beside it."""
    x, k = sphere(384, 8, 0), 24
    inertia = [float(kmeans(x, k, seeded(), iterations=n, restarts=1, tolerance=0.0).inertia) for n in (1, 3, 100)]
    assert inertia[0] > inertia[1] > inertia[2]
    one = sum(float(kmeans(x, k, seeded(s), restarts=1).inertia) for s in range(8))
    best = sum(float(kmeans(x, k, seeded(s), restarts=10).inertia) for s in range(8))
    assert best < one * 0.995


def test_both_ways_agree(monkeypatch):
    """From the same seeds to the same clusters, empty ones and steps of the tolerance included."""
    for tolerance in (0.0, 1e-2):
        for seed in range(4):
            x = blobs(300, 12, 30, seed, spread=1.0)
            monkeypatch.setattr(clustering, "SMALL", 300)
            together = kmeans(x.double(), 25, seeded(seed), tolerance=tolerance)
            monkeypatch.setattr(clustering, "SMALL", 299)
            in_turn = kmeans(x.double(), 25, seeded(seed), tolerance=tolerance)
            assert torch.equal(together.index, in_turn.index)
            torch.testing.assert_close(together.centers, in_turn.centers)


@pytest.mark.parametrize("D", [3, 64, 1000])
def test_equal_samples_are_at_no_distance(D):
    """Rounding leaves |x|^2 + |y|^2 - 2 x . y a little above 0 where x = y, and seeds would be drawn there."""
    x = torch.randn(60, D).repeat(4, 1)
    distance, exact = clustering._distances(x, x), torch.cdist(x.double(), x.double()).square()
    same = torch.arange(240)[:, None] % 60 == torch.arange(240) % 60
    assert (distance[same] == 0).all()
    torch.testing.assert_close(distance.double(), exact, rtol=1e-5, atol=1e-5 * D)
    some = clustering._distances(x[:7], x, x.square().sum(1))
    torch.testing.assert_close(some, distance[:7], rtol=1e-5, atol=1e-5 * D)
    assert (some[same[:7]] == 0).all()


def test_how_far_centers_moved():
    """What `_moved` finds from distances is what the features say."""
    x = torch.randn(50, 6, dtype=torch.float64)
    distance = clustering._distances(x, x)
    labels = torch.randint(0, 4, (2, 3, 50))
    states, centers = [], []
    for label in labels:
        segments = clustering.Segments(label, 4)
        states.append((label, segments.count, segments.means(distance)))
        centers.append(segments.means(x))
        for r in range(3):
            for c in range(4):
                torch.testing.assert_close(centers[-1][r, c], x[label[r] == c].mean(0))
    moved = clustering._moved(*states)
    torch.testing.assert_close(moved, (centers[1] - centers[0]).square().sum((1, 2)))


@pytest.mark.parametrize("tolerance", [1e-4, 0.3])
def test_tolerance_ends_a_run(monkeypatch, tolerance):
    """A run ends in the first iteration that moves centers by no more: scikit-learn's rule, from the same seeds."""
    x = sphere(400, 6, 0)
    seeds = torch.arange(0, 400, 25)
    begin_with(monkeypatch, seeds)
    centers, limit = x[seeds].double(), tolerance * x.double().var(0, correction=0).mean()
    label, steps = torch.cdist(x.double(), centers).argmin(1), 0
    while True:
        after = torch.stack([x[label == c].double().mean(0) for c in range(16)])
        moved = (after - centers).square().sum()
        centers, steps = after, steps + 1
        assigned = torch.cdist(x.double(), centers).argmin(1)
        same, label = torch.equal(assigned, label), assigned
        if same or moved <= limit:
            break
    assert not (same and tolerance > 0.1)
    expected = torch.stack([x[label == c].double().mean(0) for c in range(16)])
    for small in (2048, 0):
        monkeypatch.setattr(clustering, "SMALL", small)
        found = kmeans(x, 16, seeded(), restarts=1, tolerance=tolerance).centers
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        capped = kmeans(x, 16, seeded(), restarts=1, tolerance=0.0, iterations=steps).centers
        torch.testing.assert_close(capped, found, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = blobs(200, 16, 10, 0).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found, widened = kmeans(x, 10, seeded()), kmeans(x.to(wide), 10, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        cast = kmeans(x, 10, seeded())
    for one, other, third in zip(found, widened, cast, strict=True):
        assert one.dtype == (torch.int64 if one is found.index else wide)
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    strided = torch.stack([x, -x], 2)[:, :, 0]
    assert torch.equal(kmeans(strided, 10, seeded()).index, found.index)
    assert not kmeans(x.requires_grad_(), 10, seeded()).centers.requires_grad


def test_index_is_that_of_nearest_center():
    x = sphere(384, 32, 1)
    centers, index, inertia = kmeans(x, 64, seeded())
    own = oodkern.nearest_center(x, centers)
    assert (own.index == index).float().mean() > 0.99
    torch.testing.assert_close(own.squared_distance.sum(), inertia, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("way")
def test_no_columns():
    """Samples that are all alike."""
    assert kmeans(torch.empty(5, 0), 2, seeded()).inertia == 0


def test_errors():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"features: expected \[N, D\], got \[10\]"):
        kmeans(x[:, 0], 2, seeded())
    with pytest.raises(TypeError, match=r"features: expected one of .* got int64"):
        kmeans(x.long(), 2, seeded())
    with pytest.raises(ValueError, match="clusters: expected at most 10, the number of samples, got 11"):
        kmeans(x, 11, seeded())
    with pytest.raises(ValueError, match="clusters: expected 1 or more, got 0"):
        kmeans(x, 0, seeded())
    with pytest.raises(ValueError, match="clusters: expected at most 0"):
        kmeans(x[:0], 1, seeded())
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        kmeans(x, 2, 0)
    with pytest.raises(ValueError, match="restarts: expected 1 or more, got 0"):
        kmeans(x, 2, seeded(), restarts=0)
    with pytest.raises(ValueError, match="iterations: expected 1 or more, got 0"):
        kmeans(x, 2, seeded(), iterations=0)
    with pytest.raises(ValueError, match="tolerance: expected a finite number that is not negative, got -1"):
        kmeans(x, 2, seeded(), tolerance=-1)
    for wrong in (torch.nan, torch.inf):
        x[3, 1] = wrong
        with pytest.raises(ValueError, match="features: expected finite numbers"):
            kmeans(x, 2, seeded())
