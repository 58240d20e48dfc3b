"""Seeds by the CPU's kernel against the same in PyTorch. Integers as distances make sums exact in whatever order."""

import pytest
import torch
from groups import DATA, blobs, seeded
from threads import assert_shares_its_work

import oodkern
from oodkern import _native
from oodkern.pools import clustering, kmeans, seeding

pytestmark = pytest.mark.skipif(bool(_native.missing["cpu"]), reason="no native CPU kernels")
kernel = torch.ops.oodkern.kmeans_seeds


def by_pytorch(distance, uniform):
    with oodkern.backend("reference"):
        return seeding.among(distance, uniform)


def integers(N, seed, largest=50, dtype=torch.float64):
    """Not symmetric, so that rows are not taken for columns; a third of the distances are 0."""
    distance = torch.randint(-largest // 2, largest, (N, N), generator=seeded(seed)).clamp_(min=0)
    return distance.fill_diagonal_(0).to(dtype)


@pytest.mark.parametrize("name", _native.instruction_sets())
@pytest.mark.parametrize("N", [1, 2, 31, 32, 33, 100, 384, 1030, 2048])
def test_exact_sums_give_the_same_seeds(N, name):
    for seed, (R, candidates, k) in enumerate([(1, 1, min(N, 7)), (3, 6, min(N, 64)), (4, 2, 1), (2, 3, min(N, 150))]):
        distance = integers(N, seed)
        for dtype in (torch.float32, torch.float64):
            uniform = torch.rand(k, R, candidates, generator=seeded(seed + 50), dtype=dtype)
            uniform[k // 2, 0, 0] = 0
            uniform[k // 3, -1, -1] = 1 - 2**-24
            with _native.instruction_set(name):
                found = kernel(distance, uniform)
            assert (found.shape, found.dtype) == ((R, k), torch.int64)
            assert torch.equal(found, by_pytorch(distance, uniform))


def test_float32_too():
    """With numbers of few bits their products with sums are exact as well."""
    for seed in range(10):
        distance = integers(200, seed, dtype=torch.float32)
        uniform = torch.randint(256, (40, 3, 5), generator=seeded(seed)).float() / 256
        for u in (uniform, uniform.double()):
            assert torch.equal(kernel(distance, u), by_pytorch(distance, u))


@pytest.mark.parametrize("N", [1, 5, 90])
def test_as_many_seeds_as_samples(N):
    x = torch.randint(-30, 30, (N, 3), generator=seeded(N)).double()
    distance = torch.cdist(x, x).square().round()
    uniform = torch.rand(N, 3, 4, generator=seeded(1))
    found = kernel(distance, uniform)
    assert torch.equal(found, by_pytorch(distance, uniform))
    distinct = len(x.unique(dim=0))
    assert all(len(x[seeds[:distinct]].unique(dim=0)) == distinct for seeds in found)


@pytest.mark.parametrize("N", [1, 5, 32, 70])
def test_equal_samples(N):
    """Where there is nothing to draw the last sample is taken."""
    distance, uniform = torch.zeros(N, N), torch.rand(4, 2, 3, generator=seeded())
    found = kernel(distance, uniform)
    assert torch.equal(found, by_pytorch(distance, uniform))
    assert (found[:, 1:] == N - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_seeds_are_rounded_alike(dtype):
    for N in (3, 1000, 2047):
        uniform = torch.rand(1, 10_000, 1, generator=seeded(N), dtype=dtype)
        ends = torch.arange(1, N + 1).to(dtype) / N
        uniform[0, :N, 0] = torch.nextafter(ends, torch.zeros_like(ends))
        distance = torch.zeros(N, N)
        assert torch.equal(kernel(distance, uniform), by_pytorch(distance, uniform))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _native.instruction_sets())
def test_each_seed_is_the_best_of_its_candidates(name, dtype):
    """Of distances that are not exact: step by step, from the seeds before, in float64 and up to rounding."""
    eps = 64 * torch.finfo(dtype).eps
    for data in ("sphere", "plane", "line of unequal steps"):
        x = DATA[data](3)[0].to(dtype)
        x = x - x.mean(0)
        distance = clustering._distances(x, x)
        uniform = torch.rand(40, 3, 5, generator=seeded(7))
        with _native.instruction_set(name):
            seeds = kernel(distance, uniform)
        exact = distance.double()
        for r in range(3):
            closest = exact[seeds[r, 0]]
            for step in range(1, 40):
                reach = torch.cat([torch.zeros(1).double(), closest.cumsum(0)])
                point = reach[-1] * uniform[step, r].double()[:, None]
                slack = eps * reach[-1]
                may = (reach[:-1] <= point + slack) & (reach[1:] > point - slack) & (closest > 0)
                left = torch.minimum(exact, closest).sum(1)
                assert may[:, seeds[r, step]].any()
                bound = torch.where(may, left, 0).amax(1).amin()
                assert left[seeds[r, step]] <= bound * (1 + eps)
                closest = torch.minimum(closest, exact[seeds[r, step]])


def test_rounding_draws_no_sample_at_distance_0():
    """Numbers just below 1 are drawn among the last that have a distance, whichever way a block's sum is rounded."""
    for seed in range(300):
        distance = torch.rand(60, 60, generator=seeded(seed))
        distance[:, 25:32] = 0
        distance[:, 50:] = 0
        uniform = torch.full((2, 1, 1), 1 - 2**-53, dtype=torch.float64)
        uniform[0] = 0.5
        assert kernel(distance, uniform)[0].tolist() == [30, 49]
        first_block = torch.cat([distance[:, :32], distance[:, 50:]], 1)[:42]  # all that counts is in one block
        assert kernel(first_block, uniform)[0].tolist() == [21, 24]


def test_duplicates_are_not_drawn():
    distinct = torch.randn(7, 16, generator=seeded(1)) + 3
    x = distinct.repeat(30, 1)[torch.randperm(210, generator=seeded())]
    seeds = kernel(clustering._distances(x, x), torch.rand(7, 50, 3, generator=seeded(2)))
    assert all(len(x[own].unique(dim=0)) == 7 for own in seeds)


def test_layouts():
    distance, uniform = integers(70, 0), torch.rand(20, 3, 4, generator=seeded())
    expected = kernel(distance, uniform)
    wide = torch.cat([distance, distance + 1], 1)
    numbers = torch.stack([uniform, uniform / 2], 3)[..., 0]
    for view in (wide[:, :70], distance.T.contiguous().T):
        assert not view.is_contiguous()
        assert torch.equal(kernel(view, numbers), expected)
    expanded = distance[:1].expand(70, 70)
    assert torch.equal(kernel(expanded, uniform), by_pytorch(expanded.contiguous(), uniform))


def test_same_bits_for_any_number_of_threads():
    """And each restart is what it is alone."""
    distance = clustering._distances(x := blobs(1500, 8, 100, 0), x)
    uniform = torch.rand(150, 5, 6, generator=seeded())
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(kernel(distance, uniform))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    alone = torch.cat([kernel(distance, uniform[:, r : r + 1]) for r in range(5)])
    assert torch.equal(alone, results[0])


def test_many_seeds_are_shared_out():
    distance, uniform = torch.rand(1500, 1500), torch.rand(300, 4, 6)
    assert_shares_its_work(lambda: kernel(distance, uniform))


def test_who_computes(monkeypatch):
    """The kernel where it is, PyTorch elsewhere; and clusters are as good."""
    called = []
    raw = seeding.raw
    monkeypatch.setattr(seeding, "raw", lambda *arguments: called.append(arguments[:2]) or raw(*arguments))
    cases = [(*DATA["sphere"](seed), seed) for seed in range(6)]

    def inertia():
        called.clear()
        return sum(float(kmeans(x, k, seeded(seed)).inertia) for x, k, seed in cases)

    usual = inertia()
    assert called == [("native", "kmeans_seeds")] * 6
    with oodkern.backend("reference"):
        assert inertia() == pytest.approx(usual, rel=0.01)
    assert not called
    monkeypatch.setitem(_native.missing, "cpu", "_cpu.so was not built")
    assert inertia() == pytest.approx(usual, rel=0.01)
    assert not called


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtypes(dtype):
    """Random numbers come in it."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert kmeans(blobs(50, 4, 5, 0), 5, seeded()).index.unique().numel() == 5
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    arguments = torch.rand(20, 20, dtype=dtype), torch.rand(4, 3, 2)
    torch.library.opcheck(kernel.default, arguments)


def test_rejects_what_it_cannot_compute():
    distance, uniform = torch.rand(6, 6), torch.rand(3, 2, 4)
    for wrong in (distance[:5], distance[0], distance.half(), distance.long()):
        with pytest.raises(RuntimeError, match=r"distance: expected \[N, N\] float64 or float32"):
            kernel(wrong, uniform)
    for wrong in (uniform[0], uniform.half(), uniform.long()):
        with pytest.raises(RuntimeError, match=r"uniform: expected \[k, R, candidates\] float64 or float32"):
            kernel(distance, wrong)
    for wrong in (uniform[:0], uniform[:, :, :0]):
        with pytest.raises(RuntimeError, match="uniform: expected at least one seed and one candidate"):
            kernel(distance, wrong)
    with pytest.raises(RuntimeError, match="distance: expected at least one sample"):
        kernel(distance[:0, :0], uniform)
    assert kernel(distance, uniform[:, :0]).shape == (0, 3)


def test_numbers_out_of_range_stay_in_memory():
    for number in (1.0, 7.0, -3.0, 1e30, torch.nan, torch.inf, -torch.inf):
        for distance in (torch.rand(40, 40), torch.full((40, 40), torch.inf), torch.full((40, 40), torch.nan)):
            seeds = kernel(distance, torch.full((5, 2, 3), number))
            assert ((seeds >= 0) & (seeds < 40)).all()
