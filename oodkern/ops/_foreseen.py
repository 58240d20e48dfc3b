"""Scores whose gradients are formed with them: of features alone, or for an upstream that the caller foresees.

A score does not know its upstream before the backward pass, and forms logits that are too many to be kept a second time
then: four products features @ weight.T for the score and both gradients. A loss that is a sum over rows knows what its
slope in a score will be once the score is there, so that three products do. Of the features' gradient the upstream is a
factor of each row, which can be multiplied to it later: two products instead of three where the weight needs no
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern.ops._autograd import apply, formed_with_values, readable
from oodkern.ops._checks import check_tensor, score_dtype
from oodkern.ops._linear_score import LinearScoreGradient
from oodkern.ops._product import check_beside, raw, wanted


class Upstream(NamedTuple):
    """The slope that a loss will have in a score S: that of linear S + |hinge| relu(+-(S - margin))^2, times a factor.

    The sign is the hinge's: positive hinges act above the margin, negative ones below it. Each is [N], in the dtype of
    the score; the factor is the same for all rows, and need not be known. What comes back is compared with it: where
    it is another one, or bfloat16 gradients are to be multiplied by what is no power of two (which would round them
    again), or a second derivative is asked for, gradients are formed anew, at two or three products more than without.
    """

    linear: Tensor
    hinge: Tensor | None = None
    margin: Tensor | None = None

    def check(self, features: Tensor) -> None:
        if (self.hinge is None) != (self.margin is None):
            raise ValueError("upstream: expected hinge and margin together, got one of them")
        dtype = score_dtype(features)
        for name, value in self._asdict().items():
            if value is None:
                continue
            check_tensor(value, f"upstream.{name}")
            if value.shape != features.shape[:1] or value.dtype != dtype:
                raise ValueError(
                    f"upstream.{name}: expected [{len(features)}] of {str(dtype).removeprefix('torch.')}, one number a "
                    f"row of features, got {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
                )
            check_beside(value, f"upstream.{name}", features, "features", dtype=False)

    def detached(self) -> tuple[Tensor | None, ...]:
        return tuple(value if value is None else value.detach() for value in self)

    def rows(self, rows: slice) -> Upstream:
        hinge, margin = (value if value is None else value[rows] for value in (self.hinge, self.margin))
        return Upstream(self.linear[rows], hinge, margin)


def can_foresee(backend: str, *tensors: Tensor | None) -> bool:
    """Whether gradients can be formed with the score of a product, and may be.

    On the CPU; not in float16, whose gradients would leave the range before the loss's scale is known.
    """
    kinds = all(t is None or (t.device.type == "cpu" and t.dtype != torch.float16) for t in tensors)
    return backend == "native" and kinds and formed_with_values(*tensors)


def factor_of(grad: Tensor, foreseen: Tensor, linear: Tensor, one_rounding: bool) -> float | None:
    """The factor by which `grad` [N] is the foreseen upstream; None if it is not.

    They may differ by roundings of their terms, linear and the rest. With `one_rounding`, for gradients that were
    rounded to 16 bits already, a factor that would round them again is none.
    """
    a, b = grad.double(), foreseen.double()
    square = float(b @ b)
    if not math.isfinite(square):
        return None
    factor = float(a @ b) / square if square else 1.0
    if not math.isfinite(factor):
        return None
    eps = 8 * torch.finfo(foreseen.dtype).eps
    mantissa, exponent = math.frexp(factor)
    if factor and min(abs(mantissa) - 0.5, 1 - abs(mantissa)) <= eps:
        factor = math.copysign(math.ldexp(0.5 if abs(mantissa) < 0.75 else 1.0, exponent), factor)
    elif factor and one_rounding:
        return None
    size = linear.abs().double() + (b - linear).abs()
    return factor if bool(((a - factor * b).abs() <= eps * abs(factor) * size).all()) else None


class ForeseenScore(torch.autograd.Function):
    """Value, and what the backward pass needs; only the value is differentiable."""

    @staticmethod
    def forward(
        score: str,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        linear: Tensor,
        hinge: Tensor | None,
        margin: Tensor | None,
        for_features: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (features, weight, bias, temperature, linear, hinge, margin)
        return raw("native", "linear_score_foreseen", score, *tensors, for_features, for_weight, for_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.score, features, weight, bias, ctx.temperature, linear, *_ = inputs
        value, upstream, *gradients = output
        ctx.save_for_backward(features, weight, bias, value, upstream, linear)
        ctx.mark_non_differentiable(upstream, *gradients)
        ctx.set_materialize_grads(False)
        # Handed out once, scaled in place; a second backward pass forms them anew. There is no upstream where none were
        # formed: rows of logits so long that waves hold slices of them.
        ctx.gradients = gradients if len(upstream) == len(value) else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        nothing = (None,) * 11
        if grad is None:
            return nothing
        features, weight, bias, value, upstream, linear = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and not torch.is_grad_enabled() and readable(grad):
            factor = factor_of(grad, upstream, linear, features.dtype == torch.bfloat16)
            if factor is not None:
                scaled = gradients if factor == 1.0 else [gradient.mul_(factor) for gradient in gradients]
                return (None, *wanted(scaled, needs), *nothing[4:])
        del gradients
        tensors = (grad, features, weight, bias, value.detach(), ctx.temperature)
        formed = apply(LinearScoreGradient, "native", ctx.score, *tensors, *needs)
        return (None, *wanted(formed, needs), *nothing[4:])


# Of 16-bit features the gradient waits in float32, and with fewer classes a product takes no longer than to read, write
# and round it once more: 16,384 x 512 bfloat16 are 0.9 times as fast with 64 classes, 1.1 with 128, 1.4 with 1,000.
FEWEST_CLASSES_OF_16_BITS = 128


def pays_to_wait(features: Tensor, classes: int) -> bool:
    return features.element_size() > 2 or classes >= FEWEST_CLASSES_OF_16_BITS


def can_wait(backend: str, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the features' gradient, the only one that is wanted, is to be formed before its upstream is known."""
    head = [weight] if bias is None else [weight, bias]
    return (
        backend == "native"
        and features.device.type == "cpu"
        and pays_to_wait(features, len(weight))
        and not any(tensor.requires_grad for tensor in head)
        and formed_with_values(features, *head)
    )


class Passes(NamedTuple):
    """The passes of a score of rows, of features and the head's tensors.

    first: the score and its gradient in the features for an upstream of ones, [N, D] in the score's dtype.
    gradient: with upstream and score before them, that gradient by a Function that can be differentiated.
    """

    first: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


class WaitingScore(torch.autograd.Function):
    """A score that is differentiated in its features alone, by a gradient that waits for its upstream.

    Row n of the gradient is the upstream's n-th number times that for ones, which is kept in the score's dtype: a
    16-bit gradient is rounded once.
    """

    @staticmethod
    def forward(passes: Passes, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return passes.first(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.passes, *tensors = inputs
        value, gradient = output
        ctx.save_for_backward(value, *tensors)
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        # As of ForeseenScore: handed out once, and none where rows of logits are too long.
        ctx.gradient = gradient if gradient.shape == tensors[0].shape else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        value, features, *head = ctx.saved_tensors
        nothing = (None,) * len(head)
        if grad is None:
            return None, None, *nothing
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None and not torch.is_grad_enabled() and readable(grad):
            return None, gradient.mul_(grad.unsqueeze(1)).to(features.dtype), *nothing
        del gradient
        return None, ctx.passes.gradient(grad, value.detach(), features, *head), *nothing
