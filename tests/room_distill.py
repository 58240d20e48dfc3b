"""What tests of room `distill` share, on every device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from layouts import FLOATS
from oracle import assert_two_sided, in_float64, like, value_and_gradients
from torch import Tensor

import oodkern
from oodkern import reference

SHAPES = [(3, 5), (2, 3, 4), (1, 1), (7, 1), (4, 17), (5, 1024), (3, 1025), (3, 2500), (33, 1000), (9,)]
MIXED = [pair for pair in itertools.product(FLOATS, FLOATS) if (pair[0] == torch.float64) == (pair[1] == torch.float64)]


def eager(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    s, t = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(s, t.to(s.dtype), reduction="none").sum(-1)


def pair(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], seed: int = 0, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for dtype in dtypes]


def compare(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, function: Callable = oodkern.distillation
) -> None:
    """Value and gradient, two-sided. What rounds in the gradient q - p are its two shares."""

    def bound(function: Callable, teacher: Tensor) -> Callable:
        return lambda s: function(s, teacher, temperature)

    ours = value_and_gradients(bound(function, teacher), [student])
    oracle = in_float64(bound(reference.distillation, teacher.double()), [student])
    yardstick = value_and_gradients(bound(eager, teacher), [student])
    assert ours[0].dtype == torch.promote_types(student.dtype, torch.float32)
    assert ours[1].dtype == student.dtype
    assert (ours[0] >= 0).all()
    # The oracle's own terms cancel, to the roundings of shares that sum to 1: they show in float64 alone.
    size = torch.full_like(oracle[0], temperature**2) if student.dtype == torch.float64 else None
    assert_two_sided(ours[0], oracle[0], yardstick[0].nan_to_num(0.0), size=size)
    upstream = like(ours[0]).double().unsqueeze(-1).abs() * temperature
    shares = [(z.double() / temperature).softmax(-1).nan_to_num(0.0) for z in (student, teacher)]
    # A share errs by the roundings of (z - max) / T and of its exponent: relatively as much as that is large.
    spread = sum(torch.log(share.clamp_min(1e-300)).abs() * share for share in shares)
    size = upstream * (sum(shares) + spread)
    assert_two_sided(ours[1], oracle[1], yardstick[1].nan_to_num(0.0), "gradient", rows=True, size=size)
