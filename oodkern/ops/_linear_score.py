"""The autograd of room `linear_energy`: a score S of logits that are never stored, its gradient and its curvature.

With logits z = x . w_k + b_k, slopes p = dS/dz of a score S (E or J, see room `energy`), an upstream gradient g, and
cotangents V, U, c of the three gradients:

    dX = (g p) W           dW = (g p)^T X         db = (g p)^T 1
    t = V W^T + X U^T + c  u = sum_k p t          q = d/dz sum_j t_j p_j  (of E: -(p / T)(t - u'), u' = softmax . t)
    d/dg = u               d/dX = (g q) W + (g p) U
    d/dW = (g q)^T X + (g p)^T V                  d/db = (g q)^T 1

Every pass forms the logits of a tile anew and lets them go: memory is that of the arguments and the results. Where they
take no more than a pass holds anyway, they stay from the score to its backward pass: three products instead of four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern.ops._autograd import apply, readable
from oodkern.ops._checks import score_dtype
from oodkern.ops._product import gradient_like, no_third, one_by_one, raw, register_fake, rows_folded, wanted


class LinearScore(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str, score: str, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
    ) -> Tensor:
        return raw(backend, "linear_score", score, features, weight, bias, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, ctx.score, features, weight, bias, ctx.temperature = inputs
        ctx.save_for_backward(features, weight, bias, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad[2:5]
        features, weight, bias, value = ctx.saved_tensors
        # The derivatives of the gradient include the path through the value; attached, it would be gone along again.
        tensors = (grad, features, weight, bias, value.detach(), ctx.temperature)
        gradients = apply(LinearScoreGradient, ctx.backend, ctx.score, *tensors, needs[0], needs[1], needs[2])
        return None, None, *wanted(gradients, needs), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return rows_folded(LinearScore, info, in_dims, arguments, by_row=(2,))


class KeptLinearScore(torch.autograd.Function):
    """On the CPU: the logits stay from the score to its gradients where they are few, and become their slopes."""

    @staticmethod
    def forward(
        score: str, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return raw("native", "linear_score_kept", score, features, weight, bias, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.score, features, weight, bias, ctx.temperature = inputs
        value, logits = output
        ctx.save_for_backward(features, weight, bias, value)
        ctx.mark_non_differentiable(logits)
        ctx.set_materialize_grads(False)
        ctx.logits = logits if logits.dim() == 2 else None  # used once; a second backward pass forms them anew

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:
            return (None,) * 5
        needs = ctx.needs_input_grad[1:4]
        features, weight, bias, value = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is not None and not torch.is_grad_enabled() and readable(grad):
            kept = (grad, logits, features, weight, bias, value, ctx.temperature)
            gradients = raw("native", "linear_score_backward_kept", ctx.score, *kept, *needs)
        else:
            del logits
            tensors = (grad, features, weight, bias, value.detach(), ctx.temperature)
            gradients = apply(LinearScoreGradient, "native", ctx.score, *tensors, *needs)
        return None, *wanted(gradients, needs), None


class LinearScoreGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        score: str,
        grad: Tensor,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: Tensor,
        temperature: float,
        for_features: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad, features, weight, bias, value, temperature)
        return raw(backend, "linear_score_backward", score, *tensors, for_features, for_weight, for_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, ctx.score, *tensors, ctx.temperature, a, b, c = inputs
        ctx.save_for_backward(*tensors)
        ctx.formed = (a, b, c)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        given = [t if formed else None for t, formed in zip(cotangents, ctx.formed, strict=True)]
        if all(t is None for t in given):
            return (None,) * 11
        needs = ctx.needs_input_grad[3:6]
        grad, *rest = apply(
            LinearScoreCurvature,
            ctx.backend,
            ctx.score,
            *given,
            *ctx.saved_tensors,
            ctx.temperature,
            needs[0],
            needs[1],
            needs[2],
        )
        return None, None, grad, *wanted(rest, needs), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        if arguments[9] or arguments[10]:  # gradients of weight and bias are one for each of the batch
            return one_by_one(LinearScoreGradient, info, in_dims, arguments)
        return rows_folded(LinearScoreGradient, info, in_dims, arguments, by_row=(2, 3, 6))


class LinearScoreCurvature(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        score: str,
        features_cotangent: Tensor | None,
        weight_cotangent: Tensor | None,
        bias_cotangent: Tensor | None,
        grad: Tensor,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: Tensor,
        temperature: float,
        for_features: bool,
        for_weight: bool,
        for_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cotangents = (features_cotangent, weight_cotangent, bias_cotangent)
        tensors = (grad, features, weight, bias, value, temperature)
        return raw(
            *(backend, "linear_score_double_backward", score, *cotangents, *tensors), for_features, for_weight, for_bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.op = f"linear_{inputs[1]}"

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise no_third(ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(LinearScoreCurvature, info, in_dims, arguments)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake_score(score: str, features: Tensor, *_: Any) -> Tensor:
    return features.new_empty(features.shape[0], dtype=score_dtype(features))


def _fake_gradient(
    score: str, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, temperature: float,
    for_features: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    of = ((features, for_features), (weight, for_weight), (bias, for_bias))
    made = (gradient_like(tensor, asked) for tensor, asked in of)
    return tuple(_nothing(features) if gradient is None else gradient for gradient in made)


def _fake_curvature(score: str, *arguments: Any) -> tuple[Tensor, ...]:
    features = arguments[4]
    return features.new_empty(features.shape[0], dtype=score_dtype(features)), *_fake_gradient(score, *arguments[3:])


def _fake_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    score = [features.new_empty(features.shape[0], dtype=score_dtype(features)) for _ in range(4)]
    index = features.new_empty(features.shape[0], dtype=torch.int64)
    return score[0], score[1], score[2], index, score[3]


def _fake_foreseen(
    score: str, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, linear: Tensor | None,
    hinge: Tensor | None, margin: Tensor | None, *wanted: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    value = _fake_score(score, features)
    gradient, *others = _fake_gradient(score, value, features, weight, bias, value, temperature, *wanted)
    return value, value.clone(), gradient if linear is not None else gradient.to(value.dtype), *others


def _fake_kept(score: str, features: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """As where they are kept; nobody asks for it: see `formed_with_values`."""
    value = _fake_score(score, features)
    return value, value.new_empty(len(features), len(weight) + 16)


def _fake_gradient_of_kept(score: str, grad: Tensor, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradient(score, grad, *arguments)


register_fake("linear_score", _fake_score)
register_fake("linear_score_kept", _fake_kept)
register_fake("linear_score_backward_kept", _fake_gradient_of_kept)
register_fake("linear_score_backward", _fake_gradient)
register_fake("linear_score_double_backward", _fake_curvature)
register_fake("linear_score_foreseen", _fake_foreseen)
register_fake("linear_scores", _fake_scores)
