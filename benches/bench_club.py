"""CLUB against the closed form in plain PyTorch and against its definition: `pytest benches/bench_club.py`."""

from functools import partial

import pytest
import torch
from measure import side_by_side
from oracle import in_float64, like

import oodkern
from oodkern import reference

N, D = 1_024, 512
UPSTREAM = like(torch.empty(()))


def closed_form(mean, log_variance, target):
    """As a user would write it who has done the algebra; centered, or float32 would lose it where y is far from 0."""
    c = target - target.mean(0)
    m = mean - target.mean(0)
    return ((c.square().mean(0) + c * (2 * m - c)) * (-log_variance).exp()).sum() / (2 * len(target))


def definition(mean, log_variance, target):
    """The [N, N, D] differences, 2 GB each at the first size."""
    pairs = (target[None] - mean[:, None]).square().mean(1)
    return ((pairs - (target - mean).square()) / (2 * log_variance.exp())).sum(-1).mean()


def forward_backward(function, *tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = function(*leaves)
    return torch.autograd.grad(value, leaves, UPSTREAM.to(value.dtype))


# float32 at 128 rows, a batch of OAL, has the definition beside it.
@pytest.mark.parametrize(("rows", "dtype"), [(N, "float32"), (N, "bfloat16"), (8 * N, "float32"), (128, "float32")])
def test_club(rows, dtype, benchmark, record, rounds):
    mean, target = (torch.randn(rows, D).to(getattr(torch, dtype)) for _ in range(2))
    log_variance = torch.randn(rows, D).tanh().to(getattr(torch, dtype))
    tensors = (mean, log_variance, target)
    contenders = {
        "oodkern": partial(forward_backward, oodkern.club, *tensors),
        "eager": partial(forward_backward, closed_form, *tensors),
    }
    if rows == 128:
        contenders["definition"] = partial(forward_backward, definition, *tensors)
    exact = in_float64(reference.club, tensors)[1:]

    def error(result):
        return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(result, exact, strict=True))

    row = side_by_side(
        "contrast",
        "club forward + backward (eager: the closed form)",
        (rows, D),
        dtype,
        contenders,
        partial(forward_backward, torch.compile(closed_form), *tensors),
        error,
        rounds,
        2.0 if rows == N and dtype == "float32" else None,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=3)
    assert row.error["oodkern"] <= 2 * row.error["eager"] + 1e-6
