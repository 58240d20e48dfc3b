"""Room `select`: the lowest and highest scores of each cluster."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import FLOATS

import oodkern


def by_sorting(score, cluster, clusters, per_side):
    """Python's sort, one cluster after the other."""
    numbers, labels = score.double().tolist(), cluster.tolist()
    sides = []
    for sign in (1, -1):
        rows = []
        for c in range(clusters):
            members = [i for i, label in enumerate(labels) if label == c and not math.isnan(numbers[i])]
            members = sorted(members, key=lambda i: (sign * numbers[i], i))[:per_side]
            rows.append(members + [-1] * (per_side - len(members)))
        sides.append(torch.tensor(rows, dtype=torch.int64).reshape(clusters, per_side))
    return sides


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_against_sorting(data):
    dtype = data.draw(st.sampled_from(FLOATS))
    backend = data.draw(st.sampled_from(("native", "reference")))
    N, clusters = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 9))
    few = st.sampled_from((0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan))
    drawn = data.draw(st.lists(few if data.draw(st.booleans()) else st.floats(-9, 9, width=16), min_size=N, max_size=N))
    score = torch.tensor(drawn, dtype=dtype)
    labels = data.draw(st.lists(st.integers(0, clusters - 1), min_size=N, max_size=N))
    cluster = torch.tensor(labels, dtype=data.draw(st.sampled_from((torch.int64, torch.int32, torch.uint8))))
    if data.draw(st.booleans()):
        score, cluster = torch.stack([score, score + 1], 1)[:, 0], torch.stack([cluster, cluster], 1)[:, 1]
    per_side = data.draw(st.integers(1, 8))
    with oodkern.backend(backend):
        found = oodkern.cluster_extremes(score, cluster, clusters, per_side)
    for ours, expected in zip(found, by_sorting(score, cluster, clusters, per_side), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("per_side", [1, 3, 40])
def test_many_scores(per_side):
    """The kernel against the reference, with ties across and within clusters."""
    score = (torch.randn(20_000) * 20).round() / 4
    cluster = torch.randint(0, 100, (20_000,))
    found = oodkern.cluster_extremes(score, cluster, 128, per_side)
    with oodkern.backend("reference"):
        expected = oodkern.cluster_extremes(score, cluster, 128, per_side)
    assert torch.equal(found.lowest, expected.lowest)
    assert torch.equal(found.highest, expected.highest)
    assert (found.lowest[100:] == -1).all()


def test_lower_indices_first_and_missing_members():
    score = torch.tensor([2.0, 1.0, 1.0, 3.0, 3.0, torch.nan, 7.0])
    cluster = torch.tensor([0, 0, 0, 0, 0, 0, 2])
    lowest, highest = oodkern.cluster_extremes(score, cluster, 4, 3)
    assert lowest.tolist() == [[1, 2, 0], [-1] * 3, [6, -1, -1], [-1] * 3]
    assert highest.tolist() == [[3, 4, 0], [-1] * 3, [6, -1, -1], [-1] * 3]
    assert oodkern.cluster_extremes(score, cluster, 4).lowest.tolist() == [[1], [-1], [6], [-1]]
    only_nan = oodkern.cluster_extremes(torch.full((3,), torch.nan), torch.zeros(3, dtype=torch.int64), 1)
    assert only_nan.lowest.tolist() == only_nan.highest.tolist() == [[-1]]


def test_empty():
    for clusters in (0, 3):
        for side in oodkern.cluster_extremes(torch.empty(0), torch.empty(0, dtype=torch.int64), clusters, 2):
            assert side.tolist() == [[-1, -1]] * clusters


def test_no_graph_opcheck_and_compile():
    score = torch.randn(50, requires_grad=True)
    cluster = torch.randint(0, 5, (50,))
    assert not oodkern.cluster_extremes(score, cluster, 5).lowest.requires_grad
    for dtype in (torch.float32, torch.float64):
        arguments = (score.detach().to(dtype), cluster, 5, 2)
        torch.library.opcheck(torch.ops.oodkern.cluster_extremes.default, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(oodkern.cluster_extremes, fullgraph=True)
    for ours, expected in zip(
        compiled(score.detach(), cluster, 5, 2), oodkern.cluster_extremes(score, cluster, 5, 2), strict=True
    ):
        assert torch.equal(ours, expected)


def test_rejects_what_it_cannot_compute():
    score, cluster = torch.randn(4), torch.tensor([0, 1, 2, 0])
    for wrong, got in ((torch.tensor([0, 1, 2, 3]), 3), (torch.tensor([0, -1, 2, 0]), -1)):
        with pytest.raises(ValueError, match=rf"cluster: expected 0\.\.2, got {got}"):
            oodkern.cluster_extremes(score, wrong, 3)
        with pytest.raises(RuntimeError, match=rf"cluster: expected 0\.\.2, got {got}"):
            torch.ops.oodkern.cluster_extremes(score, wrong, 3, 1)
    with pytest.raises(TypeError, match="cluster: expected integers, got float32"):
        oodkern.cluster_extremes(score, score, 3)
    with pytest.raises(TypeError, match=r"score: expected one of .* got int64"):
        oodkern.cluster_extremes(cluster, cluster, 3)
    with pytest.raises(ValueError, match=r"cluster: expected \[4\] as score is, got \[3\]"):
        oodkern.cluster_extremes(score, cluster[:3], 3)
    with pytest.raises(ValueError, match=r"score: expected \[N\]"):
        oodkern.cluster_extremes(score[None], cluster[None], 3)
    with pytest.raises(ValueError, match="per_side: expected 1 or more, got 0"):
        oodkern.cluster_extremes(score, cluster, 3, 0)
    with pytest.raises(TypeError, match="clusters: expected an integer, got float"):
        oodkern.cluster_extremes(score, cluster, 3.0)
    with pytest.raises(ValueError, match="expected on cpu, where score are, got meta"):
        oodkern.cluster_extremes(score, cluster.to("meta"), 3)
    with pytest.raises(RuntimeError, match="score: expected"):
        torch.ops.oodkern.cluster_extremes(score.half(), cluster, 3, 1)
    with pytest.raises(RuntimeError, match="cluster: expected one int64 a score"):
        torch.ops.oodkern.cluster_extremes(score, cluster[:2], 3, 1)
