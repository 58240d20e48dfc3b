"""POEM against the posterior written with NumPy's inverse, and the same normal numbers."""

import math

import numpy as np
import pytest
import torch
from groups import seeded

from oodkern.pools.policies import POEM, POLICIES
from oodkern.pools.ranks import drawn
from oodkern.pools.store import FeatureStore


def posterior(known, outliers, sigma=20.0, noise=0.5, target=3.0):
    """Mean and covariance."""
    H = np.concatenate([known, outliers])
    y = np.r_[np.full(len(known), target), np.full(len(outliers), -target)]
    inverse = np.linalg.inv(H.T @ H / noise + np.eye(H.shape[1]) / sigma)
    return inverse @ H.T @ y / noise, sigma * inverse


def by_the_rule(known, pool, count, outliers, generator, **settings):
    chosen = drawn(len(pool), outliers, generator)
    mean, covariance = posterior(known, pool[chosen.numpy()], **settings)
    normal = torch.randn(len(mean), dtype=torch.float64, generator=generator).numpy()
    # A = L L^T and covariance = sigma A^-1: beta has this root of it, that of the inverse's factor from the other side.
    lower = np.linalg.cholesky(np.linalg.inv(covariance))
    beta = mean + np.linalg.solve(lower.T, normal)
    margin = np.abs(pool @ beta)
    return np.argsort(margin, kind="stable")[:count], beta


@pytest.fixture
def data():
    generator = seeded(7)
    return torch.randn(300, 12, generator=generator) + 0.5, torch.randn(2000, 12, generator=generator) - 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keywords", [{}, {"sigma": 2.0, "sigma_noise": 3.0, "target": 1.0}])
@pytest.mark.parametrize("outliers", [None, 40, 5000])
def test_against_numpy(data, dtype, keywords, outliers, monkeypatch):
    monkeypatch.setattr("oodkern.pools.thompson.ROWS", 128)
    known, pool = (one.to(dtype) for one in data)
    policy = POEM(known, outliers=outliers, **keywords)
    found = policy.select(FeatureStore.of(pool), None, 150, seeded(3))
    named = {"noise" if name == "sigma_noise" else name: value for name, value in keywords.items()}
    drawn_of = min(len(known) if outliers is None else outliers, len(pool))
    arrays = known.double().numpy(), pool.double().numpy()
    expected, beta = by_the_rule(*arrays, 150, drawn_of, seeded(3), **named)
    assert (found.dtype, found.shape) == (torch.int64, (150,))
    assert found.tolist() == expected.tolist()
    margin = np.abs(arrays[1] @ beta)[found.numpy()]
    assert (np.diff(margin) >= 0).all()


def test_mean_and_factor(data):
    known, pool = data
    mean, factor = POEM(known).posterior(FeatureStore.of(pool), seeded(3))
    rows = drawn(len(pool), len(known), seeded(3)).numpy()
    expected, covariance = posterior(known.double().numpy(), pool.double().numpy()[rows])
    assert np.allclose(mean.numpy(), expected, rtol=1e-9)
    assert np.allclose(20.0 * torch.cholesky_inverse(factor).numpy(), covariance, rtol=1e-9)


def test_drawn_boundaries_have_the_posterior_spread():
    """Of two rows of unit length |beta| along them decides, and the posterior says how often which is smaller."""
    known, pool = torch.ones(3, 2) * torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    mean, covariance = posterior(known.double().numpy(), pool.double().numpy())
    assert abs(covariance[0, 1]) < 1e-12
    store, generator, trials = FeatureStore.of(pool), seeded(), 600
    first = sum(int(POEM(known, outliers=2).select(store, None, 1, generator)) == 0 for _ in range(trials)) / trials
    a, b = np.random.default_rng(0).normal(mean, np.sqrt(covariance.diagonal()), (10**6, 2)).T
    expected = float((np.abs(a) <= np.abs(b)).mean())
    assert 0.1 < expected < 0.9
    assert abs(first - expected) < 5 * math.sqrt(expected * (1 - expected) / trials)


def test_seeds_and_stores(data, tmp_path):
    known, pool = (one.half() for one in data)
    np.save(tmp_path / "known.npy", known.numpy())
    np.save(tmp_path / "pool.npy", pool.numpy())
    store = FeatureStore.open(tmp_path / "pool.npy")
    found = POEM(known).select(store, None, 50, seeded())
    assert found.equal(POEM(FeatureStore.open(tmp_path / "known.npy")).select(store, None, 50, seeded()))
    assert not found.equal(POEM(known).select(store, None, 50, seeded(1)))
    assert POEM(known).prepare(store, None, seeded()).select(store, None, 50, seeded()).equal(found)


def test_ties_and_rows_that_are_not_finite(data):
    known, pool = data
    pool[::2] = pool[0]
    pool[5::50] = torch.nan
    pool[7, 3] = torch.inf
    found = POEM(known).select(FeatureStore.of(pool), None, 1959, seeded()).tolist()
    assert len(set(found)) == 1959
    equal = [row for row in found if row % 2 == 0]
    assert equal == list(range(0, 2000, 2))
    assert not {row for row in found if pool[row].isnan().any()}
    with pytest.raises(ValueError, match=r"^count: expected at most 1960, the samples with a score, got 1961$"):
        POEM(known).select(FeatureStore.of(pool), None, 1961, seeded())


def test_errors(data):
    known, pool = data
    store = FeatureStore.of(pool)
    assert POLICIES["poem"] is POEM
    missing = r"^known: expected features \[n, D\] of in-distribution samples, by the pool's model, got None$"
    with pytest.raises(ValueError, match=missing):
        POEM().select(store, None, 5, seeded())
    with pytest.raises(ValueError, match=r"^known: expected \[n, 12\] with n >= 1 as the pool has, got \[300, 11\]$"):
        POEM(known[:, 1:]).select(store, None, 5, seeded())
    with pytest.raises(ValueError, match=r"^known: expected \[n, 12\] with n >= 1 as the pool has, got \[0, 12\]$"):
        POEM(known[:0]).select(store, None, 5, seeded())
    known[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^known: expected finite features, got others$"):
        POEM(known).select(store, None, 5, seeded())
    for keywords, error in (
        ({"known": "path"}, r"known: expected a Tensor \[n, D\] or a FeatureStore, got str"),
        ({"sigma": 0}, "sigma: expected a finite number above 0, got 0"),
        ({"sigma_noise": math.nan}, "sigma_noise: expected a finite number above 0, got nan"),
        ({"target": "3"}, "target: expected a number, got str"),
        ({"outliers": 0}, "outliers: expected 1 or more, got 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{error}$"):
            POEM(**keywords)
