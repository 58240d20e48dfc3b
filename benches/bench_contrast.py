"""Room `contrast` against eager PyTorch and torch.compile: `pytest benches/bench_contrast.py`."""

from functools import partial

import pytest
import torch
from measure import relative_error, side_by_side
from oracle import like

import oodkern
from oodkern import reference

N, D = 8_192, 128
TARGETS = {(False, "float32"): 2.0}
UPSTREAM = like(torch.empty(N))
TARGET = torch.randperm(N, generator=torch.Generator().manual_seed(3))


def eager(q, k, symmetric):
    """As CLIP and its like write it: normalise, one product, a cross-entropy a direction."""
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    scores = (q @ k.T).float() / 0.1
    rows = torch.nn.functional.cross_entropy(scores, TARGET, reduction="none")
    if not symmetric:
        return rows
    columns = torch.nn.functional.cross_entropy(scores.T, TARGET.argsort(), reduction="none")
    return (rows + columns[TARGET]) / 2


def ours(q, k, symmetric):
    return oodkern.info_nce(q, k, TARGET, 0.1, symmetric=symmetric)


def forward_backward(function, q, k, symmetric):
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k)]
    return torch.autograd.grad(function(*leaves, symmetric), leaves, UPSTREAM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one direction", "symmetric"])
def test_info_nce(symmetric, dtype, benchmark, record, rounds):
    q, k = (torch.randn(N, D).to(getattr(torch, dtype)) for _ in range(2))
    contenders = {
        "oodkern": partial(forward_backward, ours, q, k, symmetric),
        "eager": partial(forward_backward, eager, q, k, symmetric),
    }
    leaf = q.double().requires_grad_()
    value = reference.info_nce(leaf, k.double(), TARGET, 0.1, symmetric=symmetric)
    (exact,) = torch.autograd.grad(value, leaf, UPSTREAM.double())
    del value
    row = side_by_side(
        "contrast",
        f"info_nce {'symmetric ' if symmetric else ''}forward + backward",
        (N, N, D),
        dtype,
        contenders,
        partial(forward_backward, torch.compile(eager), q, k, symmetric),
        lambda result: relative_error(result[0], exact),
        rounds,
        TARGETS.get((symmetric, dtype)),
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=1)
    assert row.error["oodkern"] <= 2 * row.error["eager"] + 1e-5
    assert row.beyond["oodkern"] <= row.beyond["eager"] / 20
