"""How seeds of k-means are drawn on a device, whose sums of floats do not repeat; and k-means there."""

import pytest
import torch
from groups import DATA, blobs, seeded

import oodkern
from oodkern.pools import kmeans, seeding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 2, 7, 1000, 1 << 16])
def test_exact_draws_are_those_of_the_weights(N, dtype):
    """Against the rule in integers of any size, and against the sums of floats, which may miss by their rounding."""
    weight = torch.rand(3, N, generator=seeded(1), dtype=dtype) ** 8
    weight[:, ::3] = 0
    weight[0] *= 1e-30
    weight[1] *= 1e30
    uniform = torch.rand(3, 50, generator=seeded(2))
    uniform[:, 0] = 0
    uniform[:, 1] = 1 - 2**-24
    drawn = seeding.drawn(weight, uniform, exact=True)
    assert ((drawn >= 0) & (drawn < N)).all()
    share = weight.double() / weight.double().sum(1, keepdim=True).clamp(min=1e-300)
    reach = share.cumsum(1)
    if N > 1:  # of one sample the only weight is 0
        assert (share.gather(1, drawn) > 0).all()
        assert (reach.gather(1, drawn) >= uniform - 1e-9).all()
        assert ((reach - share).gather(1, drawn) <= uniform + 1e-9).all()
        same = drawn == seeding.drawn(weight.double(), uniform.double(), exact=False)
        assert same[:, 2:].double().mean() > 0.98


def test_exact_draws_where_there_is_nothing_to_draw():
    for exact in (True, False):
        assert seeding.drawn(torch.zeros(2, 5), torch.rand(2, 3), exact).eq(4).all()


@pytest.mark.usefixtures("way")
def test_exact_draws_make_clusters_as_good(monkeypatch):
    """What a device does, on the CPU."""
    cases = [(*DATA["sphere"](seed), seed) for seed in range(6)]
    usual = sum(float(kmeans(x, k, seeded(seed)).inertia) for x, k, seed in cases)
    drawn, calls = seeding.drawn, []

    def exactly(weight, uniform, exact):
        calls.append(exact)
        return drawn(weight, uniform, True)

    monkeypatch.setattr(seeding, "drawn", exactly)
    with oodkern.backend("reference"):
        exact = sum(float(kmeans(x, k, seeded(seed)).inertia) for x, k, seed in cases)
    assert exact == pytest.approx(usual, rel=0.01)
    assert calls
    assert not any(calls)


@pytest.mark.gpu
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("data", DATA)
def test_cuda_repeats_and_agrees_with_the_cpu(data):
    """The same random numbers: the same bits each time, and clusters as good as those of the CPU."""
    ratios = []
    for seed in range(6):
        x, k = DATA[data](seed)
        first = kmeans(x.cuda(), k, seeded(seed))
        for _ in range(3):
            for one, other in zip(first, kmeans(x.cuda(), k, seeded(seed)), strict=True):
                assert torch.equal(one, other)
        ratios.append(float(first.inertia) / float(kmeans(x, k, seeded(seed)).inertia))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.02)


@pytest.mark.gpu
def test_cuda_repeats_with_many_samples():
    """Sums over many blocks of a device, whose order is not fixed where they are of floats."""
    x = blobs(200_000, 16, 300, 0).cuda()
    first = kmeans(x, 64, seeded(), iterations=3, restarts=1)
    for _ in range(5):
        for one, other in zip(first, kmeans(x, 64, seeded(), iterations=3, restarts=1), strict=True):
            assert torch.equal(one, other)
