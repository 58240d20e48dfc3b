"""Room `pairwise_hinge`: the mean hinge of all pairs of two sets of scores."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import oodkern
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal

MARGIN = 0.5
MOST_PAIRS = 1 << 24  # of those who form them all
CHUNK_PAIRS = 1 << 18


def published_hinge(id_score, ood_score):
    """All pairs."""
    return (ood_score - id_score[:, None] + MARGIN).relu().mean()


def closed_form(id_score, ood_score):
    """Sorts the smaller part, counts by searchsorted, sums by cumsum (in double: a float32 one cancels). Autograd adds
    the gradient up along the same way."""
    dtype = id_score.dtype
    if len(ood_score) < len(id_score):
        id_score, ood_score = -ood_score, -id_score
    ordered = id_score.sort().values
    x = ood_score + MARGIN
    below = torch.searchsorted(ordered.detach(), x.detach())
    sums = F.pad(ordered.double().cumsum(0), (1, 0))
    total = (below * x.double() - sums[below]).sum()
    return (total / (len(id_score) * len(ood_score))).to(dtype)


class Counts(torch.autograd.Function):
    """The same with the gradient written by hand: counts of a bincount, scattered back through the sort."""

    @staticmethod
    def forward(ctx, id_score, ood_score):
        swapped = len(ood_score) < len(id_score)
        few, many = (-ood_score, -id_score) if swapped else (id_score, ood_score)
        ordered, order = few.sort()
        x = many + MARGIN
        below = torch.searchsorted(ordered, x, out_int32=True)
        levels = torch.bincount(below, minlength=len(few) + 1)
        above = levels.flip(0).cumsum(0)[:-1].flip(0)
        total = (below * x.double()).sum() - (above * ordered.double()).sum()
        share = 1 / (len(few) * len(many))
        few_slope = torch.empty_like(few).scatter_(0, order, above * -share)
        many_slope = below * share
        ctx.save_for_backward(*((-many_slope, -few_slope) if swapped else (few_slope, many_slope)))
        return (total * share).float()

    @staticmethod
    def backward(ctx, grad):
        id_slope, ood_slope = ctx.saved_tensors
        return grad * id_slope, grad * ood_slope


def chunked_hinge(id_score, ood_score, *, upstream):
    """All pairs, some rows of them at a time; how many are above 0 are the slopes."""
    x = ood_score + MARGIN
    share = upstream / (len(id_score) * len(ood_score))
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    id_slope, ood_slope = torch.empty_like(id_score), torch.zeros_like(ood_score)
    rows = max(1, CHUNK_PAIRS // len(x))
    for start in range(0, len(id_score), rows):
        part = slice(start, start + rows)
        pairs = x - id_score[part, None]
        above = pairs > 0
        value += pairs.relu_().sum()
        id_slope[part] = above.sum(1)
        ood_slope += above.sum(0)
    return id_slope.mul_(-share), ood_slope.mul_(share)


def scores(N, M, generator):
    return random_normal(generator, (N,), "float32", 3.0) + 40, random_normal(generator, (M,), "float32", 3.0) + 37


@case
def pairwise_hinge(*, N: int, M: int, target: float | None = None) -> Case:
    contenders = {
        OURS: Contender(functools.partial(oodkern.pairwise_hinge, margin=MARGIN)),
        "eager": Contender(Counts.apply),
        "eager, autograd": Contender(closed_form),
        COMPILED: Contender(closed_form, compiled=True),
    }
    if N * M <= MOST_PAIRS:
        contenders["published"] = Contender(published_hinge)
        contenders["chunked"] = Contender(chunked_hinge, by_hand=True)
    return Case(
        room="pairwise_hinge",
        title="pairwise_hinge, backward",
        sizes={"N": N, "M": M},
        dtype="float32",
        passes="backward",
        inputs=functools.partial(scores, N, M),
        contenders=contenders,
        oracle=closed_form,  # of float64; that of all pairs takes seconds
        leaves=(0, 1),
        bytes=2 * (bytes_of((N,), "float32") + bytes_of((M,), "float32")),
        target=target,
    )
