"""How the numbers of room `heads` are judged, on the CPU and by the kernels of a GPU."""

import torch
from oracle import assert_two_sided, like

import oodkern
from oodkern import reference

MARGIN = -7.0  # near the energies of the logits below


def labels(z, dtype=torch.bool, seed=5):
    """One in five labels is 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(z.shape, generator=generator) < 0.2).to(z.device, dtype)


def eager_energy(z, side):
    over = -torch.logsumexp(z, -1) - MARGIN
    return (over if side == "in" else -over).relu().square()


def eager_bce(z, y):
    return torch.nn.functional.binary_cross_entropy_with_logits(z, y.to(z.dtype), reduction="none").mean(-1)


# The function, the oracle and what a user would write; each of logits (and of the keyword upstream, the function).
HEADS = {
    "oe": (oodkern.oe_head, reference.oe_head, lambda z: torch.logsumexp(z, -1) - z.mean(-1)),
    "energy in": (
        lambda z, **k: oodkern.energy_head(z, MARGIN, "in", **k),
        lambda z: reference.energy_head(z, MARGIN, "in"),
        lambda z: eager_energy(z, "in"),
    ),
    "energy out": (
        lambda z, **k: oodkern.energy_head(z, MARGIN, "out", **k),
        lambda z: reference.energy_head(z, MARGIN, "out"),
        lambda z: eager_energy(z, "out"),
    ),
    "bce": (
        lambda z, **k: oodkern.bce_head(z, labels(z), **k),
        lambda z: reference.bce_head(z, labels(z)),
        lambda z: eager_bce(z, labels(z)),
    ),
}


def random(shape, dtype, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def value_and_gradient(function, z, grad, **keywords):
    leaf = z.detach().requires_grad_()
    value = function(leaf, **keywords)
    return value.detach(), torch.autograd.grad(value, leaf, grad.to(value.dtype))[0]


def compare(head, z, foresee="nothing", through=lambda function: function):
    """Two-sided, with the gradient multiplied (nothing foreseen), handed out, or formed anew."""
    function, oracle, eager = HEADS[head]
    function = through(function)
    score = torch.promote_types(z.dtype, torch.float32)
    upstream = like(torch.empty(z.shape[:-1], dtype=score))
    foreseen = {"nothing": None, "itself": upstream, "another": upstream.flip(-1) if upstream.dim() else -upstream}
    value, gradient = value_and_gradient(function, z, upstream, upstream=foreseen[foresee])
    exact, slope = value_and_gradient(oracle, z.double(), upstream.double())
    yardstick = [t.nan_to_num(0.0) for t in value_and_gradient(eager, z, upstream)]
    assert (value.dtype, gradient.dtype) == (score, z.dtype)
    # What rounds: E beside a margin that takes most of it, and in the slope its parts p and 1 / K, or 2 (E - margin).
    energy = reference.energy(z.double()).nan_to_num(0.0, 0.0, 0.0)
    size, slope_size = exact, largest_part(head, z.double()) * upstream.double().abs().unsqueeze(-1)
    if head.startswith("energy"):
        size = 2 * exact.sqrt() * (energy.abs() + abs(MARGIN)) + exact
        slope_size = 2 * (energy.abs() + abs(MARGIN)).unsqueeze(-1) * slope_size
    elif head == "oe":
        size = exact.nan_to_num(0.0, 0.0) + (z.double().nan_to_num(0.0, 0.0, 0.0).abs().mean(-1) if z.shape[-1] else 0)
    assert_two_sided(value, exact, yardstick[0], head, size=size)
    assert_two_sided(gradient, slope, yardstick[1], f"{head}: gradient", rows=True, size=slope_size)


def largest_part(head, z):
    if head == "bce":
        return torch.full_like(z, 1 / max(z.shape[-1], 1)) if z.shape[-1] else z
    return z.softmax(-1).nan_to_num(0.0)
