"""Policies that go by one score, against NumPy's sort of all scores."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from groups import seeded
from pools_of_scores import HEAD, pool_of, scores_with, sharded

from oodkern.ops.linear_energy import LinearScores
from oodkern.pools import policies
from oodkern.pools.policies import NTOM, POLICIES, EnergyWindow, LowestMargin, TopScore, Uniform
from oodkern.pools.store import FeatureStore
from oodkern.reference import linear_scores

KINDS = ["different", "ties", "NaN"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def ascending(scores):
    """Indices by (score, index), without those of NaN."""
    order = np.argsort(scores, kind="stable")
    return order[: np.count_nonzero(~np.isnan(scores))]


def window(scores, low, high):
    """The indices between two quantiles, which are multiples of 1 / 8."""
    order = ascending(scores)
    return order[int(low * 8) * len(order) // 8 : -(-int(high * 8) * len(order) // 8)].tolist()


@pytest.fixture(params=KINDS)
def scores(request):
    return scores_with(request.param, 1003, seed=1)


@pytest.fixture(params=[100, 1 << 18])
def rows(request, monkeypatch):
    """Chunks of scores: several, and one."""
    monkeypatch.setattr(policies, "ROWS", request.param)
    monkeypatch.setattr("oodkern.pools.ranks.ROWS", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 37, 600])
def test_ranks(scores, rows, dtype, count):
    store, generator = pool_of(scores, dtype), seeded()
    order = ascending(scores)
    assert TopScore().select(store, HEAD, count, generator).tolist() == order[:count].tolist()
    start = len(order) // 8
    assert NTOM().select(store, HEAD, count, generator).tolist() == order[start : start + count].tolist()
    found = NTOM(0.25).select(store, HEAD, count, generator)
    assert found.tolist() == order[len(order) // 4 :][:count].tolist()
    assert (found.dtype, found.shape) == (torch.int64, (count,))
    highest = [int(i) for i in np.lexsort((np.arange(len(scores)), -scores)) if not math.isnan(scores[i])]
    assert TopScore(largest=True).select(store, HEAD, count, generator).tolist() == highest[:count]
    margin = np.abs(scores.astype(np.float64) - 3.0)
    assert LowestMargin(3.0).select(store, HEAD, count, generator).tolist() == ascending(margin)[:count].tolist()
    assert generator.get_state().equal(seeded().get_state())  # nothing is drawn where nothing is random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.25), (0.5, 0.75), (0.0, 1.0), (0.875, 1.0)])
def test_window(scores, rows, dtype, low, high):
    store, policy, inside = pool_of(scores, dtype), EnergyWindow(low, high), window(scores, low, high)
    found = policy.select(store, HEAD, 90, seeded())
    assert len(set(found.tolist())) == 90
    assert set(found.tolist()) <= set(inside)
    assert found.equal(policy.select(store, HEAD, 90, seeded()))
    assert not found.equal(policy.select(store, HEAD, 90, seeded(1)))
    everything = policy.select(store, HEAD, len(inside), seeded())
    assert sorted(everything.tolist()) == sorted(inside)
    assert everything.tolist() != sorted(inside)


def test_window_is_uniform():
    scores, trials = scores_with("ties", 60, seed=1), 300
    store, inside, generator = pool_of(scores), window(scores, 0.25, 0.75), seeded()
    seen = np.zeros(60)
    for _ in range(trials):
        seen[EnergyWindow(0.25, 0.75).select(store, HEAD, 5, generator).numpy()] += 1
    expected = trials * 5 / len(inside)
    assert set(np.flatnonzero(seen)) == set(inside)
    assert (np.abs(seen[inside] - expected) < 5 * math.sqrt(expected)).all()


@pytest.mark.parametrize("count", [0, 3, 500, 1003])
def test_uniform(count):
    store = FeatureStore.of(torch.full((1003, 2), torch.nan))  # which nobody looks at
    found = Uniform().select(store, None, count, seeded())
    assert len(found.unique()) == len(found) == count
    assert found.equal(Uniform().select(store, None, count, seeded()))
    if count:
        assert not found.equal(Uniform().select(store, None, count, seeded(1)))
        assert found.tolist() != sorted(found.tolist())
    if count == len(store):
        assert sorted(found.tolist()) == list(range(count))


@pytest.mark.parametrize("score", ["energy", "joint_energy", "max_logit", "msp", "-joint_energy", "-msp"])
@pytest.mark.parametrize("module", [False, True])
def test_any_score_of_any_head(score, module):
    torch.manual_seed(3)
    features, linear = torch.randn(100, 16), torch.nn.Linear(16, 7)
    every = LinearScores(*linear_scores(features, linear.weight.detach(), linear.bias.detach()))
    expected = getattr(every, score.removeprefix("-")).numpy() * (-1 if score.startswith("-") else 1)
    assert np.diff(np.sort(expected)[:21]).min() > 1e-6  # above rounding
    head = linear if module else (linear.weight.detach(), linear.bias.detach())
    found = TopScore(score).select(FeatureStore.of(features), head, 20, seeded())
    assert found.tolist() == ascending(expected)[:20].tolist()


@pytest.mark.parametrize("bias", [True, False])
def test_absent_class(bias):
    torch.manual_seed(4)
    features, linear = torch.randn(400, 16).half(), torch.nn.Linear(16, 5, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(4)
    probability = (features.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)).softmax(1)
    expected = probability[:, -1].detach().numpy()
    assert np.diff(np.sort(np.log(expected))[50:150]).min() > 1e-6
    found = NTOM(absent_class=True).select(FeatureStore.of(features), linear, 80, seeded())
    assert found.tolist() == ascending(expected)[50:130].tolist()


def test_absent_class_has_no_ties_where_it_is_nothing():
    """Softmax is 0 in float32 for the first two."""
    store = FeatureStore.of(torch.tensor([[200.0], [300.0], [1.0]]))
    head = (torch.tensor([[1.0], [-1.0]]), None)
    assert NTOM(0.0, absent_class=True).select(store, head, 3, seeded()).tolist() == [1, 0, 2]


def test_margin_is_formed_in_float64():
    """In float32 both distances would be 1."""
    scores = np.array([1.0, 1 + 2**-20], np.float32)
    assert LowestMargin(2**8 + 1.0).select(pool_of(scores, torch.float32), HEAD, 1, seeded()).tolist() == [1]
    assert np.float32(2**8) == np.float32(2**8 + 1) - (np.float32(1) + np.float32(2**-20))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_several_shards_are_one_pool(name, dtype, tmp_path):
    features = torch.randn(1003, 16, generator=seeded()).to(dtype)
    head = (torch.randn(5, 16, generator=seeded(1)), None)
    options = {"margin": {"threshold": -2.0}, "poem": {"known": features[:50]}, "dos": {"clusters": 6}}
    policy = POLICIES[name](**options.get(name, {"clusters": 6} if name == "gregplus" else {}))
    store = sharded(tmp_path / "pool", features, 300)
    assert len(store.shards) == 4
    expected = policy.select(FeatureStore.of(features), head, 90, seeded(2))
    assert policy.select(store, head, 90, seeded(2)).equal(expected)
    assert len(expected.unique()) == 90


@pytest.mark.parametrize(
    "policy", [EnergyWindow(0.0, 1.0), NTOM(0.0), LowestMargin(0.0), TopScore(), TopScore(largest=True)]
)
def test_no_more_than_have_a_score(policy):
    scores = np.array([1, np.nan, 3, np.nan, 2], np.float32)
    store = pool_of(scores)
    assert sorted(policy.select(store, HEAD, 3, seeded()).tolist()) == [0, 2, 4]
    with pytest.raises(ValueError, match=r"^count: expected at most 3, the samples with a score, got 4$"):
        policy.select(store, HEAD, 4, seeded())


def test_no_more_than_are_in_the_slice():
    store = pool_of(np.arange(16, dtype=np.float32))
    with pytest.raises(ValueError, match=r"^count: expected at most 14, the samples from the quantile on, got 15$"):
        NTOM().select(store, HEAD, 15, seeded())
    with pytest.raises(ValueError, match=r"^count: expected at most 4, the samples from low to high, got 5$"):
        EnergyWindow().select(store, HEAD, 5, seeded())


@pytest.mark.parametrize("name", POLICIES)
def test_arguments(name):
    policy = POLICIES[name](**{"threshold": 0.0} if name == "margin" else {})
    assert policy.name == name
    store = pool_of(np.arange(5, dtype=np.float32))
    assert policy.select(store, HEAD, 0, seeded()).tolist() == []
    for count, error in ((6, "expected at most 5, the number of samples, got 6"), (-1, "expected 0 or more, got -1")):
        with pytest.raises(ValueError, match=f"^count: {error}$"):
            policy.select(store, HEAD, count, seeded())
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator, got int$"):
        policy.select(store, HEAD, 2, 0)
    with pytest.raises(TypeError, match=r"^count: expected an integer, got float$"):
        policy.select(store, HEAD, 2.0, seeded())
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "other"
    if name not in ("uniform", "poem"):
        with pytest.raises(
            ValueError, match=r"^head: expected an nn.Linear, or \(weight, bias\), for the scores, got None$"
        ):
            policy.__class__(**{"threshold": 0.0} if name == "margin" else {}).select(store, None, 2, seeded())


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: EnergyWindow(0.5, 0.25), "low: expected at most high, 0.25, got 0.5"),
        (lambda: EnergyWindow(high=1.5), "high: expected 0..1, got 1.5"),
        (lambda: EnergyWindow(low=math.nan), "low: expected 0..1, got nan"),
        (lambda: NTOM(-0.1), "quantile: expected 0..1, got -0.1"),
        (lambda: NTOM(True), "quantile: expected a number, got bool"),
        (lambda: NTOM(absent_class=1), "absent_class: expected True or False, got int"),
        (lambda: LowestMargin(math.inf), "threshold: expected a finite number, got inf"),
        (lambda: LowestMargin("0"), "threshold: expected a number, got str"),
        (
            lambda: TopScore("argmax"),
            "score: expected one of energy, joint_energy, max_logit, msp, or minus one of them (-msp), got 'argmax'",
        ),
        (lambda: TopScore(largest=1), "largest: expected True or False, got int"),
    ],
)
def test_settings(make, error):
    with pytest.raises((TypeError, ValueError)) as raised:
        make()
    assert str(raised.value) == error
