"""What the tests of room `heads` beside its numbers are about."""

import torch

import oodkern

MARGIN = -7.0
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def labels(z):
    """Of a position in the row alone, so that they are the same for every view of the rows."""
    return (torch.arange(z.shape[-1]) % 3 == 0).expand(z.shape)


HEADS = {
    "oe": oodkern.oe_head,
    "energy in": lambda z, **k: oodkern.energy_head(z, MARGIN, "in", **k),
    "energy out": lambda z, **k: oodkern.energy_head(z, MARGIN, "out", **k),
    "bce": lambda z, **k: oodkern.bce_head(z, labels(z), **k),
}


def random(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def gradient_of(function, z, grad, **keywords):
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, **keywords), leaf, grad)[0]
