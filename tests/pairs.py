"""What CLUB and the pairwise hinge are judged by on every device: their definitions with all pairs, and how large a
result's terms are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from oracle import assert_two_sided, in_float64, like, value_and_gradients
from torch import Tensor

import oodkern
from oodkern import reference


def same(N: int, D: int, K: int = 0) -> tuple[tuple[int, int], ...]:
    return (N, D), (N, D), (N, D)


def dense(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """The definition, with all pairs of rows, in float32 at least."""
    mean, log_variance, target = (reference.widen(t) for t in (mean, log_variance, target))
    pairs = (target[None] - mean[:, None]).square().mean(1)
    return ((pairs - (target - mean).square()) / (2 * log_variance.exp())).sum(-1).mean()


def terms(mean: Tensor, log_variance: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """How large what is added up is, in float64: of the value, and of each number of the three gradients.

    A mean of the target is a sum whose rounding scales with what is added up, and it is in each c.
    """
    n, w = max(len(target), 1), (-log_variance).exp()
    c, m = target - target.mean(0), (mean - target.mean(0)).abs()
    size = c.abs() + c.abs().mean(0)
    each = (c.square().mean(0) + size * (2 * m + size)) * w / 2
    of_target = (mean - target).abs() * w + w.mean(0) * size + (m * w).mean(0)
    return each.sum() / n, size * w / n, each / n, of_target / n


def judge_club(inputs: Sequence[Tensor], function: Callable[..., Tensor] = oodkern.club) -> None:
    ours, eager = (value_and_gradients(each, inputs) for each in (function, dense))
    exact = in_float64(reference.club, inputs)
    sizes = terms(*[tensor.double() for tensor in inputs])
    upstream = like(ours[0]).double().abs()
    assert_two_sided(ours[0], exact[0], eager[0], size=sizes[0])
    for i in (1, 2, 3):
        assert_two_sided(ours[i], exact[i], eager[i], f"gradient {i}", size=sizes[i] * upstream)


def all_pairs(id_score: Tensor, ood_score: Tensor, margin: float = 0.0) -> Tensor:
    """The definition of the hinge, in float32 at least."""
    id_score, ood_score = reference.widen(id_score), reference.widen(ood_score)
    return (ood_score[None] - id_score[:, None] + margin).relu().mean()


def scores(N: int, M: int, dtype: torch.dtype, seed: int = 0, offset: float = 0.0, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator, dtype=torch.float64) * scale + offset).to(dtype) for size in (N, M)]


def judge_hinge(
    pair: Sequence[Tensor], margin: float, function: Callable[..., Tensor] = oodkern.pairwise_hinge
) -> None:
    """Slopes are counts: exact, but for the rounding of one product; the value is a sum of differences."""
    ours = value_and_gradients(lambda a, b: function(a, b, margin), pair)
    exact = in_float64(lambda a, b: all_pairs(a, b, margin), pair)
    dtype = pair[0].dtype
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(ours[0].dtype).eps
    spread = 0.0
    if dtype == torch.float64:  # what float64 leaves of the differences, however large the scores
        together = torch.cat([tensor.detach() for tensor in pair])
        spread = 64 * eps * float(together.max() - together.min() + abs(margin))
    assert (ours[0].double() - exact[0]).abs() <= 2 * eps * exact[0].abs() + spread
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        rounding = 3 * eps + (0.501 * torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 else 0.0)
        if dtype == torch.float64:  # the oracle adds up as many numbers as a count says
            rounding *= 1000
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert ((a.double() - b).abs() <= rounding * b.abs() + smallest).all()
