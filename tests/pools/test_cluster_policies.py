"""GReg+ and DOS against their rule written with lists."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from groups import blobs, seeded
from pools_of_scores import HEAD, pool_of, scores_with

from oodkern.pools import cluster_policies
from oodkern.pools.minibatch import assign, minibatch_kmeans
from oodkern.pools.policies import DOS, GRegPlus
from oodkern.pools.store import FeatureStore
from oodkern.reference import linear_energy

NAMES = ["different", "ties", "NaN"]


def by_the_rule(scores, clustering, clusters, count, two_way):
    """The ends of each cluster in order, each sample once."""
    high = count // 2 if two_way else 0
    chosen = []
    for sign, number in ((1, count - high), (-1, high)):
        for c in range(clusters):
            members = [i for i in np.flatnonzero(clustering == c).tolist() if not np.isnan(scores[i])]
            members.sort(key=lambda i: (sign * scores[i], i))
            quota = number // clusters + (c < number % clusters)
            chosen += [i for i in members[:quota] if i not in chosen]
    return chosen


def unequal(N, clusters, seed):
    """Clusters of which some are small, one of a single sample and one of none."""
    random = np.random.default_rng(seed)
    share = np.r_[random.dirichlet(np.full(clusters - 2, 0.7)), 0, 0]
    clustering = random.choice(clusters, N, p=share)
    clustering[0] = clusters - 2
    return clustering


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("two_way", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5, 11, 100, 400, 799])
def test_against_the_rule(kind, two_way, count, monkeypatch):
    monkeypatch.setattr(cluster_policies, "ROWS", 300)
    scores, clustering = scores_with(kind, 1003, seed=2), unequal(1003, 12, 3)
    store = pool_of(scores)
    policy = (GRegPlus if two_way else DOS)(12, clustering=torch.from_numpy(clustering).to(torch.int16))
    found = policy.select(store, HEAD, count, seeded()).tolist()
    ends = by_the_rule(scores, clustering, 12, count, two_way)
    assert len(found) == len(set(found)) == count
    assert found[: len(ends)] == ends
    assert not np.isnan(scores[found]).any()
    again, other = (policy.select(store, HEAD, count, seeded(seed)).tolist() for seed in (0, 1))
    assert found == again
    assert (found == other) == (len(ends) == count)


def test_all_that_have_a_score():
    scores, clustering = scores_with("NaN", 1003, seed=2), torch.from_numpy(unequal(1003, 12, 3))
    store, most = pool_of(scores), int(np.count_nonzero(~np.isnan(scores)))
    policy = GRegPlus(12, clustering=clustering)
    found = policy.select(store, HEAD, most, seeded())
    assert sorted(found.tolist()) == np.flatnonzero(~np.isnan(scores)).tolist()
    with pytest.raises(ValueError, match=f"^count: expected at most {most}, the samples with a score, got {most + 1}$"):
        policy.select(store, HEAD, most + 1, seeded())


def test_the_rest_is_uniform():
    """One cluster has all samples, and gives two; the other nine have none."""
    scores, trials = np.arange(100, dtype=np.float32), 300
    store, policy, generator = pool_of(scores), GRegPlus(10, clustering=torch.zeros(100, dtype=torch.int32)), seeded()
    seen = np.zeros(100)
    for _ in range(trials):
        found = policy.select(store, HEAD, 20, generator)
        assert found[:2].tolist() == [0, 99]
        seen[found[2:].numpy()] += 1
    expected = trials * 18 / 98
    assert (np.abs(seen[1:99] - expected) < 5 * expected**0.5).all()


def test_balance():
    """10,000 of 64 clusters: 78 or 79 from each side of each cluster, and no random ones."""
    random = np.random.default_rng(0)
    scores, clustering = random.permutation(40_000).astype(np.float32), random.integers(0, 64, 40_000)
    policy = GRegPlus(clustering=torch.from_numpy(clustering))
    found = policy.select(pool_of(scores, torch.float32), HEAD, 10_000, seeded()).numpy()
    for side, sign in ((found[:5000], 1), (found[5000:], -1)):
        numbers = np.bincount(clustering[side], minlength=64)
        assert set(numbers) == {78, 79}
        for c in range(64):
            members = np.flatnonzero(clustering == c)
            best = members[np.argsort(sign * scores[members])][: numbers[c]]
            assert side[clustering[side] == c].tolist() == best.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [GRegPlus, DOS])
def test_prepared_once_for_any_head(kind, dtype):
    """Clusters are those of the features; another head finds other ends of them."""
    features = blobs(12_000, 16, 40, 0).to(dtype)
    store = FeatureStore.of(features)
    policy = kind(10).prepare(store, None, seeded())
    centers = minibatch_kmeans(store, 10, seeded())
    clustering = assign(store, centers).index.long()
    assert policy.clustering.dtype == torch.int16
    assert policy.clustering.long().equal(clustering)
    found = []
    for seed in (1, 2):
        head = torch.nn.Linear(16, 5)
        torch.nn.init.normal_(head.weight, generator=seeded(seed))
        energy = linear_energy(features.float(), head.weight, head.bias).detach().numpy().astype(np.float64)
        own = policy.select(store, head, 200, seeded())
        expected = by_the_rule(energy, clustering.numpy(), 10, 200, kind is GRegPlus)
        # Two energies may change places where they agree to rounding.
        assert np.abs(energy[own.numpy()] - energy[expected]).max() < 1e-5
        assert len(set(own.tolist()) & set(expected)) >= 198
        assert clustering[own].equal(clustering[torch.tensor(expected)])
        found.append(set(own.tolist()))
    assert found[0] != found[1]
    with_clustering = replace(policy, two_way=False).select(store, head, 100, seeded())
    assert len(with_clustering.unique()) == 100


@pytest.mark.parametrize("kind", [GRegPlus, DOS])
def test_without_prepare(kind):
    """The generator makes the clusters first."""
    store = FeatureStore.of(blobs(600, 4, 40, 0).half())
    found = kind(7).select(store, HEAD, 100, seeded())
    generator = seeded()
    assert found.equal(kind(7).prepare(store, HEAD, generator).select(store, HEAD, 100, generator))
    assert not found.equal(kind(7).select(store, HEAD, 100, seeded(5)))


@pytest.mark.parametrize("kind", [GRegPlus, DOS])
def test_absent_class(kind):
    torch.manual_seed(4)
    features, head = torch.randn(400, 16).half(), torch.nn.Linear(16, 5)
    probability = (features.double() @ head.weight.double().T + head.bias.double()).softmax(1)[:, -1]
    clustering = unequal(400, 6, 3)
    ordered = np.sort(probability.detach().log().numpy())
    assert np.diff(ordered).min() > 1e-7
    policy = kind(6, absent_class=True, clustering=torch.from_numpy(clustering))
    ends = by_the_rule(probability.detach().numpy(), clustering, 6, 60, kind is GRegPlus)
    assert policy.select(FeatureStore.of(features), head, 60, seeded())[: len(ends)].tolist() == ends


def test_errors():
    store = pool_of(np.arange(5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"^clusters: expected at most 5, the number of samples, got 64$"):
        GRegPlus().select(store, HEAD, 2, seeded())
    with pytest.raises(ValueError, match=r"^clustering: expected \[5\], one a sample, got \[4\]$"):
        GRegPlus(2, clustering=torch.zeros(4, dtype=torch.int16)).select(store, HEAD, 2, seeded())
    with pytest.raises(ValueError, match=r"^cluster: expected 0..1, got 2$"):
        GRegPlus(2, clustering=torch.full((5,), 2)).select(store, HEAD, 2, seeded())
    for keywords, error in (
        ({"clusters": 0}, "clusters: expected 1 or more, got 0"),
        ({"clusters": 2.0}, "clusters: expected an integer, got float"),
        ({"two_way": 1}, "two_way: expected True or False, got int"),
        ({"absent_class": None}, "absent_class: expected True or False, got NoneType"),
        (
            {"score": "e"},
            "score: expected one of energy, joint_energy, max_logit, msp, or minus one of them \\(-msp\\), got 'e'",
        ),
    ):
        for kind in (GRegPlus, DOS):
            with pytest.raises((TypeError, ValueError), match=f"^{error}$"):
                kind(**keywords)
