"""Room `linear_energy`: reductions of the logits features @ weight.T + bias, which are never stored.

With logits z = x . w_k + b_k, slopes p = dS/dz of a score S (E or J, see room `energy`), an upstream gradient g, and
cotangents V, U, c of the three gradients:

    dX = (g p) W           dW = (g p)^T X         db = (g p)^T 1
    t = V W^T + X U^T + c  u = sum_k p t          q = d/dz sum_j t_j p_j  (of E: -(p / T)(t - u'), u' = softmax . t)
    d/dg = u               d/dX = (g q) W + (g p) U
    d/dW = (g q)^T X + (g p)^T V                  d/db = (g q)^T 1

Every pass forms the logits of a tile anew and lets them go: memory is that of the arguments and the results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._checks import check_temperature, score_dtype
from oodkern.ops._product import (
    autocast,
    check_head,
    gradient_like,
    no_third,
    one_by_one,
    raw,
    register_fake,
    rows_folded,
    wanted,
)


class LinearScores(NamedTuple):
    """Scores [N] of each row's logits; argmax is int64, the lowest index where several logits are largest."""

    energy: Tensor
    joint_energy: Tensor
    max_logit: Tensor
    argmax: Tensor
    msp: Tensor


def linear_energy(features: Tensor, weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Energy of each row of features @ weight.T + bias, E = -T log sum_k exp(z_k / T), without forming the logits.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        weight: [K, D], in the dtype of the features (under autocast all three are cast to its dtype).
        bias: [K] or None.
        temperature: T > 0, in units of the logits.

    Returns:
        [N], in units of the logits; float32 (float64 for float64 features), also under autocast, and with logits
        that are never rounded to 16 bits. As an OOD score: larger = more OOD.

    Differentiable twice in features, weight and bias, any of which may need no gradient; gradients have the dtype of
    what they are of and are accumulated in float32 at least (of slopes that are rounded to bfloat16 where processors
    multiply that, and to 16 bits on GPUs). Beyond arguments, results and gradients it holds at most 16 MiB on the CPU,
    where matrices without dense rows are copied first, and on a GPU a wave of slopes (mostly 30 MB) and the float32
    sums of the weight's gradient, whatever N. Raises TypeError or ValueError for an argument of the wrong kind or
    shape.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_head(features, weight, bias)
    return _linear_score("energy", features, weight, bias, check_temperature(temperature))


def linear_joint_energy(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """JointEnergy of each row of features @ weight.T + bias, J = sum_k log(1 + exp(z_k)), without forming the logits.

    **High** for in-distribution inputs: -J is the OOD score. Arguments, dtypes, derivatives and memory as for
    `linear_energy`; non-negative, in nats.

    Source: Wang et al., Can multi-label classification networks know what they don't know?, NeurIPS 2021.
    """
    check_head(features, weight, bias)
    return _linear_score("joint_energy", features, weight, bias, 1.0)


@torch.no_grad()
def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearScores:
    """Five scores of each row of features @ weight.T + bias in one pass over the logits, which are never stored.

    Arguments and dtypes as for `linear_energy`; K >= 1. Returns `LinearScores`, each [N]: energy and joint_energy as
    those ops give them, max_logit = max_k z_k, argmax, and msp = exp(max_logit + energy), the largest softmax
    probability. Not differentiable. (As OOD scores take energy, -joint_energy, -max_logit, -msp.)
    """
    check_head(features, weight, bias)
    if len(weight) == 0:
        raise ValueError("weight: expected at least one class, got [0, D]")
    features, weight, bias = autocast(features, weight, bias)
    backend = backend_for("linear_energy", features, len(weight))
    if backend == "reference":
        return LinearScores(*reference.linear_scores(features, weight, bias))
    return LinearScores(*raw(backend, "linear_scores", features, weight, bias))


def _linear_score(score: str, features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    features, weight, bias = autocast(features, weight, bias)
    backend = backend_for("linear_energy", features, len(weight))
    if backend == "reference":
        if score == "energy":
            return reference.linear_energy(features, weight, bias, temperature)
        return reference.linear_joint_energy(features, weight, bias)
    return LinearScore.apply(backend, score, features, weight, bias, temperature)


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
        gradients = LinearScoreGradient.apply(ctx.backend, ctx.score, *tensors, needs[0], needs[1], needs[2])
        return None, None, *wanted(gradients, needs), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return rows_folded(LinearScore, info, in_dims, arguments, by_row=(2,))


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
        grad, *rest = LinearScoreCurvature.apply(
            ctx.backend, ctx.score, *given, *ctx.saved_tensors, ctx.temperature, needs[0], needs[1], needs[2]
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


register_fake("linear_score", _fake_score)
register_fake("linear_score_backward", _fake_gradient)
register_fake("linear_score_double_backward", _fake_curvature)
register_fake("linear_scores", _fake_scores)
