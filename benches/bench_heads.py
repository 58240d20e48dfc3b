"""Room `heads`, value and gradient, against eager PyTorch: `pytest benches/bench_heads.py`.

The loss is a mean over the rows, `mean` with the head as it is and `foreseen` with the upstream told to it.
"""

from functools import partial

import pytest
import torch
from measure import relative_error, side_by_side

import oodkern
from oodkern import reference

SHAPES = [(8_192, 1_000), (512, 21_841)]
MARGIN = -20.0
TARGET = 2.0  # ratio to eager, on 2 cores


def labels(logits):
    """One in twenty is 1."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(logits.shape, generator=generator) < 0.05


def eager_energy(logits):
    return (-torch.logsumexp(logits, -1) - MARGIN).relu().square()


def eager_bce(logits, target):
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return entropy.mean(-1)


# Ours, eager and the oracle; of logits and what else there is.
HEADS = {
    "oe_head": (oodkern.oe_head, lambda z: torch.logsumexp(z, -1) - z.mean(-1), reference.oe_head),
    "energy_head": (
        partial(oodkern.energy_head, margin=MARGIN, side="in"),
        eager_energy,
        lambda z: reference.energy_head(z, MARGIN, "in"),
    ),
    "bce_head": (oodkern.bce_head, eager_bce, reference.bce_head),
}


def value_and_gradient(function, logits, *others, **keywords):
    leaf = logits.detach().requires_grad_()
    function(leaf, *others, **keywords).mean().backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("case", ["mean", "foreseen"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name, case, shape, dtype, benchmark, record, rounds):
    ours, eager, oracle = HEADS[name]
    logits = (torch.randn(shape) * 4).to(getattr(torch, dtype))
    others = (labels(logits),) if name == "bce_head" else ()
    told = {"upstream": 1 / shape[0]} if case == "foreseen" else {}
    contenders = {
        "oodkern": partial(value_and_gradient, ours, logits, *others, **told),
        "eager": partial(value_and_gradient, eager, logits, *others),
    }
    rows = slice(0, 256)  # the oracle's temporaries are many times the logits: judge the error on a part
    leaf = logits[rows].double().requires_grad_()
    (oracle(leaf, *(tensor[rows] for tensor in others)).sum() / shape[0]).backward()
    row = side_by_side(
        "heads",
        f"{name} {case}, value + gradient",
        shape,
        dtype,
        contenders,
        partial(value_and_gradient, torch.compile(eager), logits, *others),
        lambda result: relative_error(result[rows], leaf.grad),
        rounds,
        TARGET,
    )
    record(row)
    benchmark.pedantic(contenders["oodkern"], rounds=3)
    assert row.error["oodkern"] <= 2 * row.error["eager"] + 1e-6
