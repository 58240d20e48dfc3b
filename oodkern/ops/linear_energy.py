"""Room `linear_energy`: reductions of the logits features @ weight.T + bias, which are never stored.

Formulas and derivatives: `oodkern.ops._linear_score`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import apply, formed_with_values
from oodkern.ops._checks import check_temperature
from oodkern.ops._foreseen import ForeseenScore, Passes, Upstream, WaitingScore, can_foresee, can_wait
from oodkern.ops._linear_score import KeptLinearScore, LinearScore, LinearScoreGradient
from oodkern.ops._product import autocast, check_head, mixed_backend, raw


class LinearScores(NamedTuple):
    """Scores [N] of each row's logits; argmax is int64, the lowest index where several logits are largest."""

    energy: Tensor
    joint_energy: Tensor
    max_logit: Tensor
    argmax: Tensor
    msp: Tensor


def linear_energy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    upstream: Upstream | None = None,
) -> Tensor:
    """Energy of each row of features @ weight.T + bias, E = -T log sum_k exp(z_k / T), without forming the logits.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        weight: [K, D], in the dtype of the features (under autocast all three are cast to its dtype).
        bias: [K] or None.
        temperature: T > 0, in units of the logits.
        upstream: what the gradient that comes back will be, where the caller can tell (see `Upstream`): on the CPU
            gradients are then formed with the energies and held until the backward pass, of three products whatever N,
            where rows of logits fit into what is held, or their bfloat16 slopes into the weight's gradient.

    Returns:
        [N], in units of the logits; float32 (float64 for float64 features), also under autocast, and with logits
        that are never rounded to 16 bits. As an OOD score: larger = more OOD.

    Differentiable twice in features, weight and bias, any of which may need no gradient; gradients have the dtype of
    what they are of and are accumulated in float32 at least (of slopes that are rounded to bfloat16 where processors
    multiply that, and to 16 bits on GPUs). Beyond arguments, results and gradients it holds at most 16 MiB on the CPU,
    where matrices without dense rows are copied first, and on a GPU a wave of slopes (mostly 30 MB) and the float32
    sums of the weight's gradient, whatever N. On the CPU logits of dense float32 (or float64) matrices stay in those 16
    MiB for the backward pass where all of them fit, of bfloat16 in 8, but for many rows of less than 64 classes: three
    products instead of four; each call whose backward pass is to come holds its own. Where weight and bias need no
    gradient, that of the features is formed with the energies (of 16-bit features from 128 classes on) and waits for
    its upstream, [N, D] in the dtype of the energies: two products, of which `torch.no_grad` saves one where no
    backward pass is to come. A second backward pass and a second derivative form all of it anew. Raises TypeError or
    ValueError for an argument of the wrong kind or shape.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_head(features, weight, bias)
    return _linear_score("energy", features, weight, bias, check_temperature(temperature), upstream)


def linear_joint_energy(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, upstream: Upstream | None = None
) -> Tensor:
    """JointEnergy of each row of features @ weight.T + bias, J = sum_k log(1 + exp(z_k)), without forming the logits.

    **High** for in-distribution inputs: -J is the OOD score. Arguments, dtypes, derivatives and memory as for
    `linear_energy`; non-negative, in nats.

    Source: Wang et al., Can multi-label classification networks know what they don't know?, NeurIPS 2021.
    """
    check_head(features, weight, bias)
    return _linear_score("joint_energy", features, weight, bias, 1.0, upstream)


@torch.no_grad()
def linear_scores(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearScores:
    """Five scores of each row of features @ weight.T + bias in one pass over the logits, which are never stored.

    Arguments and dtypes as for `linear_energy`; K >= 1, and beside 16-bit features weight and bias may be float32:
    nothing of the head is rounded then, and on the CPU the features are not copied. Returns `LinearScores`, each [N]:
    energy and joint_energy, to rounding as those ops give them, max_logit = max_k z_k, argmax, and
    msp = exp(max_logit + energy), the largest softmax probability. Not differentiable. (As OOD scores take energy,
    -joint_energy, -max_logit, -msp.)
    """
    check_head(features, weight, bias, or_float32=True)
    if len(weight) == 0:
        raise ValueError("weight: expected at least one class, got [0, D]")
    backend, features, weight, bias = mixed_backend("linear_energy", *autocast(features, weight, bias))
    if backend == "reference":
        return LinearScores(*reference.linear_scores(features, weight, bias))
    return LinearScores(*raw(backend, "linear_scores", features, weight, bias))


def _linear_score(
    score: str,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    upstream: Upstream | None,
) -> Tensor:
    if upstream is not None:
        if not isinstance(upstream, Upstream):
            raise TypeError(f"upstream: expected an oodkern.Upstream or None, got {type(upstream).__name__}")
        upstream.check(features)
    features, weight, bias = autocast(features, weight, bias)
    backend = backend_for("linear_energy", features, len(weight))
    if backend == "reference":
        if score == "energy":
            return reference.linear_energy(features, weight, bias, temperature)
        return reference.linear_joint_energy(features, weight, bias)
    if upstream is not None and can_foresee(backend, features, weight, bias):
        needs = [tensor is not None and tensor.requires_grad for tensor in (features, weight, bias)]
        return apply(ForeseenScore, score, features, weight, bias, temperature, *upstream.detached(), *needs)[0]
    if can_wait(backend, features, weight, bias):
        return apply(WaitingScore, _passes(score, temperature), features, weight, bias)[0]
    if backend == "native" and features.device.type == "cpu" and formed_with_values(features, weight, bias):
        return apply(KeptLinearScore, score, features, weight, bias, temperature)[0]
    return apply(LinearScore, backend, score, features, weight, bias, temperature)


def _passes(score: str, temperature: float) -> Passes:
    def first(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        made = raw(
            "native", "linear_score_foreseen", score, *tensors, temperature, None, None, None, True, False, False
        )
        return made[0], made[2]

    def gradient(grad: Tensor, value: Tensor, *tensors: Tensor | None) -> Tensor:
        return apply(LinearScoreGradient, "native", score, grad, *tensors, value, temperature, True, False, False)[0]

    return Passes(first, gradient)
