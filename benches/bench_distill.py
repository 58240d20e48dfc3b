"""Room `distill` against eager PyTorch and torch.compile: `pytest benches/bench_distill.py`."""

from functools import partial

import pytest
import torch
from measure import relative_error, side_by_side
from oracle import like

import oodkern
from oodkern import reference

SHAPE = (8_192, 1_000)
UPSTREAM = like(torch.empty(SHAPE[0]))
TARGET = 4.0  # ratio to eager, on 2 cores


def eager(student, teacher):
    return torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)


def forward(function, student, teacher):
    with torch.no_grad():
        return function(student, teacher)


def forward_backward(function, student, teacher):
    """The gradient for a random upstream: what a training step pays."""
    leaf = student.detach().requires_grad_()
    value = function(leaf, teacher)
    return torch.autograd.grad(value, leaf, UPSTREAM[: len(value)].to(value.dtype))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("work", [forward, forward_backward], ids=["forward", "forward + backward"])
def test_distillation(work, dtype, benchmark, record, rounds, request):
    student, teacher = ((torch.randn(SHAPE) * 4).to(getattr(torch, dtype)) for _ in range(2))
    contenders = {
        "oodkern": partial(work, oodkern.distillation, student, teacher),
        "eager": partial(work, eager, student, teacher),
    }
    rows = slice(0, 2_000)  # the oracle's temporaries are many times the logits: judge the error on a part
    exact = work(reference.distillation, student[rows].double(), teacher[rows].double())
    row = side_by_side(
        "distill",
        f"distillation {request.node.callspec.id.split('-')[0]}",
        SHAPE,
        dtype,
        contenders,
        partial(work, torch.compile(eager), student, teacher),
        lambda result: relative_error(result[rows], exact),
        rounds,
        TARGET if work is forward_backward else None,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=3)
    assert row.error["oodkern"] <= 2 * row.error["eager"] + 1e-6
