"""What `cluster_extremes` and `TopK` are judged by on CUDA, in the emulator and on a GPU: streams and clusters, bit for
bit as plain PyTorch finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from oodkern import TopK, reference
from oodkern.ops import _autograd

SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0)


def scores_of(n: int, dtype: torch.dtype, kind: str, seed: int = 0) -> Tensor:
    """Scores of one kind: "distinct" (as far as the dtype can), "ties" of few values, "special" ones, or "equal"."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator, dtype=torch.float64)
    if kind == "ties":
        scores = (scores * 2).round()
    if kind == "special":
        places = torch.randint(0, len(SPECIAL), (n,), generator=generator)
        chosen = torch.tensor(SPECIAL, dtype=torch.float64)[places]
        scores = torch.where(torch.rand(n, generator=generator) < 0.5, chosen, scores)
    if kind == "equal":
        scores = torch.full_like(scores, -1.5)
    return scores.to(dtype)


KINDS = ("distinct", "ties", "special", "equal")


def check_stream(
    k: int, scores: Tensor, cuts: Sequence[int] = (), offset: int = 0, largest: bool = True, backwards: bool = False
) -> TopK:
    """TopK on scores of any device against a sort of all of them, and of the held set after each chunk."""
    top = TopK(k, largest)
    ends = sorted({0, *cuts, len(scores)})
    chunks = list(pairwise(ends))
    seen = torch.zeros(len(scores), dtype=torch.bool)
    numbers = reference.widen(scores.cpu())
    for begin, end in reversed(chunks) if backwards else chunks:
        top.update(scores[begin:end], offset + begin)
        seen[begin:end] = True
        places = (seen & ~numbers.isnan()).nonzero().squeeze(1)
        values, indices = reference.best(numbers[places], places + offset, k, largest)
        found = top.result()
        assert torch.equal(found.indices.cpu(), indices)
        assert torch.equal(found.values.cpu(), values)
        assert torch.equal(found.values.cpu().signbit(), values.signbit())
        assert (top.seen, top.nans) == (int(seen.sum()), int(numbers[seen].isnan().sum()))
        count, has_bar = top._state[:2].tolist()
        assert len(values) <= count < len(top._values)
        if has_bar:
            bar = reference.best(top._values[:k], top._indices[:k], k, largest)
            assert bar[1][-1] == top._indices[k - 1]
    return top


def check_extremes(found: Sequence[Tensor], score: Tensor, cluster: Tensor, clusters: int, per_side: int) -> None:
    expected = reference.cluster_extremes(score.cpu(), cluster.cpu(), clusters, per_side)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours.cpu(), theirs)


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    """By the raw ops: few clusters and many, few of each and many, float32 and float64, a stream that is cut."""

    def extremes(score: Tensor, cluster: Tensor, clusters: int, per_side: int) -> tuple[Tensor, Tensor]:
        return _autograd._raw("cluster_extremes", score, cluster, clusters, per_side)

    def stream(scores: Tensor, values: Tensor, indices: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        for offset in (0, 300):
            _autograd._raw("top_k_update", scores, offset, 4, True, values, indices, state)
        return values, indices, state

    for dtype in (torch.float32, torch.float64):
        score = scores_of(300, dtype, "special")
        for clusters, per_side in ((3, 2), (3000, 2), (3, 40)):
            cluster = torch.arange(300) % clusters
            check_extremes(through(extremes)(score, cluster, clusters, per_side), score, cluster, clusters, per_side)
        held = (torch.zeros(68, dtype=dtype), torch.zeros(68).long(), torch.zeros(3).long())
        _, indices, state = through(stream)(score, *held)
        assert state.tolist() == [4, 1, 2 * int(score.isnan().sum())]
        first = score.isposinf().nonzero().squeeze(1)[:4].tolist()
        assert sorted(indices[:4].tolist()) == first
