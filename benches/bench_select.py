"""Room `select`: streaming top-k and extremes of clusters against plain PyTorch: `pytest benches/bench_select.py`."""

from functools import partial

import pytest
import torch
from measure import side_by_side

import oodkern
from oodkern import reference

N, CHUNK = 10_000_000, 65_536


def streamed(scores, k):
    top = oodkern.TopK(k)
    for offset in range(0, len(scores), CHUNK):
        top.update(scores[offset : offset + CHUNK], offset)
    return top.result()


def at_once(scores, k):
    top = oodkern.TopK(k)
    top.update(scores, 0)
    return top.result()


def top_k_of_all(scores, k):
    return torch.topk(scores, k)


def top_k_of_chunks(scores, k):
    """What a scan does by hand: the best of the chunk beside the best so far."""
    values, indices = scores.new_empty(0), torch.empty(0, dtype=torch.int64)
    for offset in range(0, len(scores), CHUNK):
        chunk = scores[offset : offset + CHUNK]
        best = torch.topk(chunk, min(k, len(chunk)))
        values, place = torch.topk(torch.cat([values, best.values]), min(k, len(values) + len(best.values)))
        indices = torch.cat([indices, best.indices + offset])[place]
    return values, indices


@pytest.mark.parametrize("k", [100, 10_000, 1_000_000])
def test_top_k(k, benchmark, record, rounds):
    scores = torch.randn(N)
    contenders = {
        "oodkern": partial(streamed, scores, k),
        "oodkern, one chunk": partial(at_once, scores, k),
        "eager": partial(top_k_of_chunks, scores, k),
        "topk of all": partial(top_k_of_all, scores, k),
    }
    exact = scores.sort(descending=True).values[:k]

    def error(result):
        return float((result[0] - exact).abs().max())

    row = side_by_side("select", f"top {k:,} (eager: topk by chunks)", (N,), "float32", contenders, None, error, rounds)
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=1)
    assert row.error["oodkern"] == 0


def loop(score, cluster, clusters, per_side):
    """One mask a cluster."""
    lowest = torch.full((clusters, per_side), -1)
    highest = torch.full((clusters, per_side), -1)
    for c in range(clusters):
        members = (cluster == c).nonzero().squeeze(1)
        count = min(per_side, len(members))
        lowest[c, :count] = members[score[members].topk(count, largest=False).indices]
        highest[c, :count] = members[score[members].topk(count).indices]
    return lowest, highest


@pytest.mark.parametrize("per_side", [1, 16])
def test_cluster_extremes(per_side, benchmark, record, rounds):
    N, clusters = 100_000, 256
    score, cluster = torch.randn(N), torch.randint(0, clusters, (N,))
    arguments = (score, cluster, clusters, per_side)
    contenders = {
        "oodkern": partial(oodkern.cluster_extremes, *arguments),
        "eager": partial(loop, *arguments),
        "by sorting": partial(reference.cluster_extremes, *arguments),
    }
    exact = reference.cluster_extremes(*arguments)

    def error(result):
        return float(sum((score[a] - score[b]).abs().max() for a, b in zip(result, exact, strict=True)))

    row = side_by_side(
        "select",
        f"cluster_extremes, {per_side} a side (eager: one mask a cluster)",
        (N, clusters),
        "float32",
        contenders,
        None,
        error,
        rounds,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=3)
    assert row.error["oodkern"] == 0
