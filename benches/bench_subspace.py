"""Room `subspace` against eager PyTorch and torch.compile: `pytest benches/bench_subspace.py`."""

from functools import partial

import pytest
import torch
from measure import relative_error, side_by_side
from oracle import like

import oodkern
from oodkern import reference

UPSTREAM = like(torch.empty(65_536))


def eager_alignment(x, w):
    normalize = torch.nn.functional.normalize
    return (normalize(x, dim=-1) @ normalize(w, dim=-1).T).float().abs().mean(-1)


def eager_subspace(x, u):
    """The complement by its residual, as it has to be."""
    inside = x.float() @ u
    outside = x.float() - inside @ u.T
    return inside.square().sum(-1) + 0.5 * outside.square().sum(-1)


def ours_subspace(x, u):
    inside, outside = oodkern.subspace_energy(x, u)
    return inside + 0.5 * outside


def exact_subspace(x, u):
    inside, outside = reference.subspace_energy(x, u)
    return inside + 0.5 * outside


# name: ours, eager, oracle, shape [N, D, K]
OPS = {
    "alignment": (oodkern.alignment, eager_alignment, reference.alignment, (65_536, 512, 1_000)),
    "alignment, 10 classes": (oodkern.alignment, eager_alignment, reference.alignment, (65_536, 512, 10)),
    "subspace_energy": (ours_subspace, eager_subspace, exact_subspace, (16_384, 2_048, 128)),
}


def forward(function, x, w):
    with torch.no_grad():
        return function(x, w)


def forward_backward(function, x, w):
    """In the features alone: Separation detaches the weight, and a basis is a constant."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, w), leaf, UPSTREAM[: len(x)])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", [forward, forward_backward], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("name", OPS)
def test_subspace(name, work, dtype, benchmark, record, rounds, request):
    ours, eager, oracle, (N, D, K) = OPS[name]
    x = torch.randn(N, D).to(getattr(torch, dtype))
    w = oodkern.orthonormal_basis(torch.randn(K, D)) if "subspace" in name else torch.randn(K, D).to(x.dtype)
    contenders = {"oodkern": partial(work, ours, x, w), "eager": partial(work, eager, x, w)}
    rows = slice(0, 500)
    exact = work(oracle, x[rows].double(), w.double())
    row = side_by_side(
        "subspace",
        f"{name} {request.node.callspec.id.split('-')[1]}",
        (N, D, K),
        dtype,
        contenders,
        partial(work, torch.compile(eager), x, w),
        lambda result: relative_error(result[rows], exact),
        rounds,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=1)
    assert row.error["oodkern"] <= 2 * row.error["eager"] + 1e-6
