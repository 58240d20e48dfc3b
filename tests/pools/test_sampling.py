"""The choice of outliers of GReg+, against its rule written with lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oodkern.pools import cluster_sample, kmeans


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_the_rule(energy, clustering, clusters, per_side, two_way, available):
    """The ends of each cluster in order, each sample once."""
    chosen = []
    for sign in (1, -1) if two_way else (1,):
        for c in range(clusters):
            members = [i for i, own in enumerate(clustering) if own == c and available[i] and not math.isnan(energy[i])]
            members.sort(key=lambda i: (sign * energy[i], i))
            chosen += [i for i in members[:per_side] if i not in chosen]
    return chosen


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_against_the_rule(data):
    N, clusters = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 8))
    few = st.sampled_from((0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan))
    energy = data.draw(st.lists(few if data.draw(st.booleans()) else st.floats(-9, 9), min_size=N, max_size=N))
    clustering = data.draw(st.lists(st.integers(0, clusters - 1), min_size=N, max_size=N))
    available = data.draw(st.none() | st.lists(st.booleans(), min_size=N, max_size=N))
    may = [True] * N if available is None else available
    count = data.draw(st.integers(0, sum(may)))
    two_way, per_side = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, 4))
    found = cluster_sample(
        None,
        torch.tensor(energy, dtype=torch.float64),
        count,
        clusters,
        seeded(data.draw(st.integers(0, 3))),
        two_way,
        clustering=torch.tensor(clustering, dtype=data.draw(st.sampled_from((torch.int64, torch.int32)))),
        available=None if available is None else torch.tensor(available, dtype=torch.bool),
        per_side=per_side,
    )
    assert (found.dtype, found.shape) == (torch.int64, (count,))
    found = found.tolist()
    chosen = by_the_rule(energy, clustering, clusters, per_side or max(count // 2 // clusters, 1), two_way, may)
    ends, rest = chosen[:count], found[len(chosen) :]
    assert found[: len(ends)] == ends
    assert len(set(found)) == count
    assert all(may[i] for i in found)
    unknown = [math.isnan(energy[i]) for i in rest]
    assert unknown == sorted(unknown)
    if any(unknown):  # only where no other is left
        assert {i for i in range(N) if may[i] and not math.isnan(energy[i])} <= set(found)


def test_a_round_by_hand():
    #                        0    1    2    3    4    5    6    7
    energy = torch.tensor([3.0, 1.0, 1.0, 3.0, 5.0, 0.0, -2.0, -1.0])
    clustering = torch.tensor([0, 0, 0, 0, 2, 1, 1, 1])

    def take(count, two_way=True, **keywords):
        return cluster_sample(None, energy, count, 3, seeded(), two_way, clustering=clustering, **keywords).tolist()

    assert take(5) == [1, 6, 4, 0, 5]  # of equals the first; the singleton once
    assert take(8)[:5] == [1, 6, 4, 0, 5]
    assert sorted(take(8)[5:]) == [2, 3, 7]
    assert take(4, two_way=False)[:3] == [1, 6, 4]
    assert take(2) == [1, 6]
    assert take(0) == []
    available = torch.tensor([True, False, True, True, False, True, False, True])
    assert take(4, available=available) == [2, 7, 0, 5]
    assert take(5, available=available) == [2, 7, 0, 5, 3]
    assert take(8, per_side=2) == [1, 2, 6, 7, 4, 0, 3, 5]


def test_how_many_of_a_side():
    """int(batch / clusters) of the released code, whose batch is half of what is taken, and one at least."""
    energy, clustering = torch.arange(40.0), torch.arange(40) % 4
    for count, per_side in ((2, 1), (8, 1), (15, 1), (16, 2), (23, 2), (24, 3), (40, 5)):
        found = cluster_sample(None, energy, count, 4, seeded(), False, clustering=clustering).tolist()
        lowest = [c + 4 * rank for c in range(4) for rank in range(per_side)]
        assert found[: len(lowest)] == lowest[:count]


def test_from_features_by_direction():
    """Features are divided by their norms before they are clustered: these groups differ in direction alone."""
    group = torch.arange(60) % 4
    size = torch.rand(60, 1) * 100 + 0.1
    features = (torch.eye(8)[group] + 0.05 * torch.randn(60, 8)) * size
    energy = torch.randn(60)
    found = cluster_sample(features, energy, 20, 4, seeded())
    for members in (group == c for c in range(4)):
        low = torch.where(members, energy, torch.inf).argmin()
        high = torch.where(members, energy, -torch.inf).argmax()
        assert low in found[:16]
        assert high in found[:16]
    unit = features / features.norm(dim=1, keepdim=True)
    generator = seeded()
    index = kmeans(unit, 4, generator).index
    assert torch.equal(found, cluster_sample(None, energy, 20, 4, generator, clustering=index, per_side=2))
    assert torch.equal(found, cluster_sample(features, energy.requires_grad_(), 20, 4, seeded()))


def test_features_of_16_bits_and_zeros():
    features = torch.randn(50, 16).to(torch.bfloat16)
    features[7] = 0
    found = cluster_sample(features, torch.randn(50, dtype=torch.float16), 50, 8, seeded())
    assert sorted(found.tolist()) == list(range(50))


def test_reproducible_by_seed():
    features, energy = torch.randn(100, 8), torch.randn(100)
    state = torch.get_rng_state()
    first = cluster_sample(features, energy, 40, 6, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, cluster_sample(features, energy, 40, 6, seeded(1)))
    assert not torch.equal(first, cluster_sample(features, energy, 40, 6, seeded(2)))
    generator, clustering = seeded(1), torch.zeros(100, dtype=torch.int64)
    rest = [cluster_sample(None, energy, 40, 1, generator, clustering=clustering, per_side=1)[2:] for _ in range(2)]
    assert not torch.equal(*rest)


@pytest.mark.gpu
def test_cuda_repeats():
    generator = seeded(7)
    features, energy = (torch.randn(*shape, generator=generator) for shape in ((3000, 32), (3000,)))
    for some in (features[:500], features):  # distances held, and gone through
        few = energy[: len(some)].cuda()
        first = cluster_sample(some.cuda(), few, 300, 60, seeded(1))
        assert len(first.unique()) == 300
        for _ in range(4):
            assert torch.equal(first, cluster_sample(some.cuda(), few, 300, 60, seeded(1)))


@pytest.mark.gpu
def test_cuda_takes_of_given_clusters_what_the_cpu_takes():
    energy, clustering = torch.randn(1000), torch.randint(0, 40, (1000,))
    expected = cluster_sample(None, energy, 300, 40, seeded(1), clustering=clustering)
    found = cluster_sample(None, energy.cuda(), 300, 40, seeded(1), clustering=clustering.cuda())
    assert torch.equal(found.cpu(), expected)


def test_the_rest_is_uniform():
    """Each sample that is at no end is taken as often as any other: 3 of 18, 3,000 times."""
    energy, clustering = torch.arange(20.0), torch.zeros(20, dtype=torch.int64)
    generator, taken = seeded(), torch.zeros(20)
    for _ in range(3000):
        taken[cluster_sample(None, energy, 5, 1, generator, clustering=clustering, per_side=1)] += 1
    assert taken[[0, 19]].tolist() == [3000, 3000]
    deviation = math.sqrt(3000 * (1 / 6) * (5 / 6))
    assert ((taken[1:19] - 500).abs() < 4.5 * deviation).all()


def test_errors():
    features, energy, clustering = torch.randn(10, 3), torch.randn(10), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ValueError, match="count: expected at most 10, the number of samples, got 11"):
        cluster_sample(features, energy, 11, 2, seeded())
    with pytest.raises(ValueError, match="count: expected at most 3, the number of samples available, got 4"):
        cluster_sample(features, energy, 4, 2, seeded(), available=torch.arange(10) < 3)
    with pytest.raises(ValueError, match="count: expected 0 or more, got -1"):
        cluster_sample(features, energy, -1, 2, seeded())
    with pytest.raises(ValueError, match="clusters: expected at most 10, the number of samples, got 11"):
        cluster_sample(features, energy, 4, 11, seeded())
    with pytest.raises(ValueError, match="clusters: expected 1 or more, got 0"):
        cluster_sample(None, energy, 4, 0, seeded(), clustering=clustering)
    with pytest.raises(ValueError, match=r"cluster: expected 0\.\.1, got 2"):
        cluster_sample(None, energy, 4, 2, seeded(), clustering=clustering + 2)
    with pytest.raises(ValueError, match=r"features: expected \[N, D\] where no clustering is given, got None"):
        cluster_sample(None, energy, 4, 2, seeded())
    with pytest.raises(ValueError, match=r"features: expected 10 rows, one a number of energy, got \[9, 3\]"):
        cluster_sample(features[:9], energy, 4, 2, seeded())
    with pytest.raises(ValueError, match=r"energy: expected \[N\], one number a sample, got \[10, 3\]"):
        cluster_sample(features, features, 4, 2, seeded())
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        cluster_sample(features, energy, 4, 2, 0)
    with pytest.raises(TypeError, match="two_way: expected True or False, got Tensor"):
        cluster_sample(features, energy, 4, 2, seeded(), clustering)
    with pytest.raises(ValueError, match="per_side: expected 1 or more, got 0"):
        cluster_sample(features, energy, 4, 2, seeded(), per_side=0)
    with pytest.raises(TypeError, match="available: expected bool, got int64"):
        cluster_sample(features, energy, 4, 2, seeded(), available=clustering)
    with pytest.raises(TypeError, match="clustering: expected integers, got float32"):
        cluster_sample(features, energy, 4, 2, seeded(), clustering=energy)
    with pytest.raises(ValueError, match=r"clustering: expected \[10\] as energy is, got \[9\]"):
        cluster_sample(features, energy, 4, 2, seeded(), clustering=clustering[:9])
    with pytest.raises(ValueError, match="available: expected on cpu, where energy are, got meta"):
        cluster_sample(features, energy, 4, 2, seeded(), available=(clustering > 0).to("meta"))
