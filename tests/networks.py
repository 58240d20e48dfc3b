"""Small networks whose scores are penalised, and the penalty as plain autograd makes it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import oodkern

IMAGE = (3, 8, 8)


class Scorer(nn.Module):
    """A convolutional network and the energy of its logits."""

    def __init__(self, activation: nn.Module, norm: bool = True, classes: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            activation,
            nn.Conv2d(8, 8, 3, stride=2),
            nn.BatchNorm2d(8, momentum=None) if norm else nn.Identity(),
            activation,
            nn.Flatten(),
        )
        self.head = nn.Linear(72, classes)

    def forward(self, x: Tensor) -> Tensor:
        return oodkern.energy(self.head(self.body(x)))


def scorer(activation: nn.Module | None = None, norm: bool = True, seed: int = 0) -> Scorer:
    torch.manual_seed(seed)
    module = Scorer(nn.SiLU() if activation is None else activation, norm)
    for _ in range(3):
        module(torch.randn(16, *IMAGE) * 1.5 + 0.3)  # running statistics that are not those of the start
    return module


def batch(rows: int = 11) -> tuple[Tensor, Tensor]:
    """Inputs and weights, some of them zero or negative."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(rows, generator=generator) - 0.3
    weight[::3] = 0
    return torch.randn(rows, *IMAGE, generator=generator), weight


def plain(module: nn.Module, x: Tensor, weight: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The penalty and its gradient in all parameters, flat, one sample at a time with create_graph=True."""
    module = copy.deepcopy(module).to(dtype).eval()
    total = torch.zeros((), dtype=dtype)
    for one, w in zip(x.to(dtype), weight.to(dtype), strict=True):
        one = one[None].requires_grad_()
        with oodkern.backend("reference"):
            (gradient,) = torch.autograd.grad(module(one).sum(), one, create_graph=True)
        total = total + w * gradient.square().sum().sqrt()
    module.zero_grad()
    total.backward()
    return total.detach(), flat_gradients(module)


def flat_gradients(module: nn.Module) -> Tensor:
    """The gradients of all parameters in one row; zeros where there is none."""
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()]
    )


def penalised(module: nn.Module, penalty: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    value = penalty()
    value.backward()
    return value.detach(), flat_gradients(module)


def error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours.double() - oracle).norm() / oracle.norm())
