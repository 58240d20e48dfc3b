"""The pairwise hinge against sorts in plain PyTorch and all pairs: `pytest benches/bench_pairwise_hinge.py`."""

from functools import partial

import pytest
import torch
from measure import side_by_side
from oracle import like

import oodkern

MARGIN = 0.5
UPSTREAM = like(torch.empty(()))


def closed_form(id_score, ood_score):
    """Sorts the smaller part, counts by searchsorted, sums by cumsum (in double: a float32 one cancels). Autograd adds
    the gradient up along the same way."""
    if len(ood_score) < len(id_score):
        id_score, ood_score = -ood_score, -id_score
    ordered = id_score.sort().values
    x = ood_score + MARGIN
    below = torch.searchsorted(ordered.detach(), x.detach())
    sums = torch.nn.functional.pad(ordered.double().cumsum(0), (1, 0))
    total = (below * x.double() - sums[below]).sum()
    return (total / (len(id_score) * len(ood_score))).float()


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
        ctx.slopes = (-many_slope, -few_slope) if swapped else (few_slope, many_slope)
        return (total * share).float()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slopes[0], grad * ctx.slopes[1]


def all_pairs(id_score, ood_score):
    return (ood_score - id_score[:, None] + MARGIN).relu().mean()


def ours(id_score, ood_score):
    return oodkern.pairwise_hinge(id_score, ood_score, MARGIN)


def forward_backward(function, *scores):
    leaves = [score.detach().requires_grad_() for score in scores]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, UPSTREAM)


@pytest.mark.parametrize("sizes", [(4_096, 100_000), (100_000, 100_000), (4_096, 10_000), (64, 128)], ids=str)
def test_pairwise_hinge(sizes, benchmark, record, rounds):
    scores = torch.randn(sizes[0]) * 3 + 40, torch.randn(sizes[1]) * 3 + 37
    rivals = {"eager": Counts.apply, "autograd": closed_form}
    if sizes[0] * sizes[1] < 1 << 26:
        rivals["all pairs"] = all_pairs
    contenders = {"oodkern": partial(forward_backward, ours, *scores)}
    contenders |= {name: partial(forward_backward, rival, *scores) for name, rival in rivals.items()}
    exact = forward_backward(ours, *[score.double() for score in scores])

    def error(result):
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(result, exact, strict=True))

    row = side_by_side(
        "pairwise_hinge",
        "forward + backward (eager: the closed form by hand)",
        sizes,
        "float32",
        contenders,
        None,
        error,
        rounds,
        2.0 if sizes == (4_096, 100_000) else None,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=3)
    assert row.error["oodkern"] <= 2 * min(row.error[name] for name in rivals) + 1e-6
