"""The pairwise hinge of two sets of scores, without their pairs.

With x = ood + margin, k_j = #{i : id_i < x_j} and n_i = #{j : id_i < x_j}, both by sorting:

    L = (1 / NM) sum_ij relu(x_j - id_i) = (1 / NM) (sum_j k_j (x_j - c) - sum_i n_i (id_i - c))   for any c
    dL/dood_j = k_j / NM          dL/did_i = -n_i / NM

The counts are the slopes, and they are all that the backward pass reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import apply
from oodkern.ops._checks import check_floating, check_margin
from oodkern.ops._product import check_beside, one_by_one, raw, register_fake


def pairwise_hinge(id_score: Tensor, ood_score: Tensor, margin: float = 0.0) -> Tensor:
    """Mean over all pairs of relu(ood_j - id_i + margin), for a score that is **high** for in-distribution inputs.

    Args:
        id_score: [N], float64, float32, bfloat16 or float16: JointEnergy of the in-distribution samples.
        ood_score: [M], in the dtype of id_score (under autocast they may differ).
        margin: by how much each id_score is to exceed each ood_score, in units of the scores.

    Returns:
        A scalar in units of the scores; float32 (float64 for float64 scores), also under autocast. Where one of both
        is empty it is 0, with gradient 0.

    Twice differentiable, in both scores; gradients have their dtype. A pair at the hinge itself, ood - id + margin = 0,
    has slope 0, as in torch.relu; the second derivative is 0 in the scores and exact in what the loss goes into. The
    sign of a pair is that of ood + margin in float64 against id. A NaN, or an infinity less itself, makes the loss NaN,
    and the kernels' gradients too; an ood_score of +inf or an id_score of -inf makes the loss +inf and leaves the
    gradients what they are.

    O((N + M) log min(N, M)) time (on CUDA both sets are sorted) and O(N + M) memory, where the smaller set (on CUDA
    each) has fewer than 2^30 scores. Raises TypeError or ValueError for an argument of the wrong kind or shape.

    Source: the gap loss of EDGE, where id_score are the samples of lowest JointEnergy in the batch.
    """
    _check_scores(id_score, "id_score", "N")
    _check_scores(ood_score, "ood_score", "M")
    check_beside(ood_score, "ood_score", id_score, "id_score", dtype=not reference.autocasting(id_score))
    margin = check_margin(margin)
    id_score, ood_score = reference.widen(id_score), reference.widen(ood_score)
    dtype = torch.promote_types(id_score.dtype, ood_score.dtype)
    id_score, ood_score = id_score.to(dtype), ood_score.to(dtype)
    backend = backend_for("pairwise_hinge", id_score, 0)
    if backend == "reference":
        return reference.pairwise_hinge(id_score, ood_score, margin)
    return apply(PairwiseHinge, backend, id_score, ood_score, margin)[0]


def _check_scores(value: Any, name: str, size: str) -> None:
    check_floating(value, name)
    if value.dim() != 1:
        raise ValueError(f"{name}: expected [{size}], one number a sample, got {list(value.shape)}")


class PairwiseHinge(torch.autograd.Function):
    """The loss and its slopes, which are constants as far as derivatives go."""

    @staticmethod
    def forward(backend: str, id_score: Tensor, ood_score: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
        return raw(backend, "pairwise_hinge", id_score, ood_score, margin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, id_score, ood_score, _ = inputs
        _, id_slope, ood_slope = output
        ctx.save_for_backward(id_score, ood_score, id_slope, ood_slope)
        ctx.mark_non_differentiable(id_slope, ood_slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        _, for_id, for_ood, _ = ctx.needs_input_grad
        id_score, ood_score, id_slope, ood_slope = ctx.saved_tensors
        of_id = apply(PairwiseHingeSlope, grad, id_score, id_slope) if for_id else None
        return None, of_id, apply(PairwiseHingeSlope, grad, ood_score, ood_slope) if for_ood else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(PairwiseHinge, info, in_dims, arguments)


class PairwiseHingeSlope(torch.autograd.Function):
    """grad * slope. Linear in the upstream; in the scores, which it is told for that alone, its derivative is 0."""

    @staticmethod
    def forward(grad: Tensor, score: Tensor, slope: Tensor) -> Tensor:
        return grad * slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        (slope,) = ctx.saved_tensors
        return (cotangent * slope).sum(), torch.zeros_like(slope) if ctx.needs_input_grad[1] else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(PairwiseHingeSlope, info, in_dims, arguments)


def _fake(id_score: Tensor, ood_score: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    return id_score.new_empty(()), id_score.new_empty(id_score.shape), ood_score.new_empty(ood_score.shape)


register_fake("pairwise_hinge", _fake)
