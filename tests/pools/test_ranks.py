"""Ranks by streaming, against NumPy's sort."""

import math

import numpy as np
import pytest
import torch
from groups import seeded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oodkern.pools import ranks
from oodkern.pools.ranks import drawn, keys_of, quantile_rank, rank_members, rank_slice, scored, taken

FEW = st.sampled_from((0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan))
NUMBERS = st.lists(FEW | st.floats(width=32), max_size=60)


def by_sorting(scores):
    """Indices ascending by (score, index), NaN last."""
    return np.argsort(scores, kind="stable")  # NumPy sorts NaN last, and takes -0.0 for 0.0


@settings(max_examples=150, deadline=None)
@given(numbers=NUMBERS, rows=st.integers(1, 70), data=st.data())
@example(numbers=[0.0, -0.0, math.nan, -0.0, 0.0], rows=2, data=None)
def test_any_slice_of_any_scores(numbers, rows, data):
    scores, N = np.array(numbers, np.float32), len(numbers)
    start = 1 if data is None else data.draw(st.integers(0, N))
    stop = N if data is None else data.draw(st.integers(start, N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "ROWS", rows)
        found = rank_slice(scores, start, stop)
        pieces = [piece for piece in rank_members(scores, start, stop) if len(piece)]
    expected = by_sorting(scores)[start:stop]
    assert found.dtype == torch.int64
    assert found.tolist() == expected.tolist()
    assert [index for piece in pieces for index in piece] == sorted(expected.tolist())


@pytest.mark.parametrize("kind", ["normal", "ties", "one value", "close together", "mapped"])
def test_many(kind, tmp_path):
    random = np.random.default_rng(0)
    N = 700_000  # three chunks
    scores = {
        "normal": lambda: random.standard_normal(N),
        "ties": lambda: random.integers(-5, 5, N),
        "one value": lambda: np.full(N, 2.5),
        "close together": lambda: 1 + random.integers(0, 1000, N) * 2.0**-23,  # all in one bucket of the first pass
        "mapped": lambda: random.standard_normal(N),
    }[kind]().astype(np.float32)
    scores[::1001] = np.nan
    if kind == "mapped":
        np.save(tmp_path / "scores.npy", scores)
        scores = np.load(tmp_path / "scores.npy", mmap_mode="r")
    expected = by_sorting(scores)
    assert scored(scores) == N - len(range(0, N, 1001))
    for start, stop in ((0, 1), (0, 5000), (87_000, 97_000), (N // 2, N // 2), (N - 1000, N), (0, N)):
        assert np.array_equal(rank_slice(scores, start, stop).numpy(), expected[start:stop])


def test_keys_have_the_order():
    values = np.array([-np.inf, -3e38, -1, -1e-45, 0, 1e-45, 1, 3e38, np.inf, np.nan], np.float32)
    keys = keys_of(values)
    assert keys.dtype == np.uint32
    assert (keys[1:] > keys[:-1]).all()
    assert keys_of(np.array([-0.0], np.float32)) == keys[4]
    assert keys_of(-np.array([np.nan], np.float32)) == keys[-1]


def test_quantiles_are_what_they_are_written_as():
    assert [quantile_rank(q, 10) for q in (0.0, 0.125, 0.25, 0.99, 1.0)] == [0, 1, 2, 9, 10]
    assert [quantile_rank(q, 10, up=True) for q in (0.0, 0.125, 0.25, 0.99, 1.0)] == [0, 2, 3, 10, 10]
    assert 0.07 * 100 > 7
    assert quantile_rank(0.07, 100, up=True) == 7
    assert 0.29 * 100 < 29
    assert quantile_rank(0.29, 100) == 29
    assert quantile_rank(0.5, 0) == quantile_rank(0.5, 0, up=True) == 0


@pytest.mark.parametrize("total", [1, 7, 100, 10**6, 10**12])
def test_drawn_are_different(total):
    for count in (0, 1, min(total, 50), min(total, 1000)):
        found = drawn(total, count, seeded(1))
        assert found.dtype == torch.int64
        assert len(found) == len(found.unique()) == count
        assert count == 0 or (int(found.min()) >= 0 and int(found.max()) < total)
        assert found.equal(drawn(total, count, seeded(1)))
    assert total < 100 or not drawn(total, 50, seeded(1)).equal(drawn(total, 50, seeded(2)))


@pytest.mark.parametrize("total", [4, 30])  # a permutation, and one after the other
def test_drawn_are_uniform_in_every_place(total):
    generator, trials, count = seeded(), 3000, 3
    seen = torch.zeros(count, total)
    for _ in range(trials):
        seen[torch.arange(count), drawn(total, count, generator)] += 1
    expected = trials / total
    chi = ((seen - expected) ** 2 / expected).sum(1)
    assert (chi < total - 1 + 5 * math.sqrt(2 * (total - 1))).all()


def test_taken_in_the_order_asked_for():
    members = [np.array([2, 3]), np.empty(0, np.int64), np.array([7]), np.array([10, 11, 12])]
    assert taken(iter(members), torch.tensor([4, 0, 2, 5])).tolist() == [11, 2, 7, 12]
    assert taken(iter(members), torch.tensor([], dtype=torch.int64)).tolist() == []


def test_errors():
    scores = np.zeros(5, np.float32)
    with pytest.raises(TypeError, match=r"^scores: expected a NumPy array, got Tensor$"):
        rank_slice(torch.zeros(5), 0, 1)
    with pytest.raises(TypeError, match=r"^scores: expected float32, got float64$"):
        rank_slice(np.zeros(5), 0, 1)
    with pytest.raises(ValueError, match=r"^scores: expected \[N\], one number a sample, got \[1, 5\]$"):
        rank_slice(scores[None], 0, 1)
    with pytest.raises(ValueError, match=r"^stop: expected at most 5, the number of scores, got 6$"):
        rank_members(scores, 0, 6)
    with pytest.raises(ValueError, match=r"^stop: expected 3 or more, got 2$"):
        rank_slice(scores, 3, 2)
    with pytest.raises(ValueError, match=r"^start: expected 0 or more, got -1$"):
        rank_slice(scores, -1, 2)
