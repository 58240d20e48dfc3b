"""Room `subspace`: how features lie to the class weights and to the space that these span (neural collapse).

Alignment, with x' = x / |x|, w' = w / |w|, cos = x' . w'_k, s = sign(cos) and an upstream gradient g:

    a = (1/K) sum_k |cos_k|
    dX  = g / (K |x|) (sum_k s_k w'_k - (K a) x')
    dw_k = (1 / |w_k|) (v_k - (v_k . w'_k) w'_k),  v_k = sum_n (g_n / K) s_nk x'_n

Subspace energy, for any basis U (it need not be orthonormal), with y = U^T x, R = x - U y and s = U^T R:

    inside = |y|^2, outside = |R|^2
    dX = 2 g_in U y + 2 g_out (R - U s)
    dU = sum_n 2 g_in x y^T - 2 g_out (R y^T + x s^T)

and the derivative of g_in inside + g_out outside along cotangents (v, C) of (x, U) with y' = U^T v + C^T x and
R' = v - C y - U y', differentiated once more with a = 2 g_in and b = 2 g_out:

    d/dg_in = 2 y . y'    d/dg_out = 2 R . R'
    p = a y' - b (C^T R + U^T R')    q = a y - b s
    d/dX = b R' + U p + C q    d/dU = sum_n x p^T + v q^T - b (R' y^T + R y'^T)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import apply
from oodkern.ops._checks import check_floating, score_dtype
from oodkern.ops._foreseen import Passes, WaitingScore, can_wait
from oodkern.ops._product import (
    autocast,
    check_beside,
    check_matrix,
    gradient_like,
    no_second,
    no_third,
    one_by_one,
    raw,
    register_fake,
    rows_folded,
    wanted,
)


class SubspaceEnergy(NamedTuple):
    """Squared norms [N] of the projection onto a subspace and of its orthogonal complement."""

    inside: Tensor
    outside: Tensor


def alignment(features: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute cosine of each feature to the class weights, (1/K) sum_k |cos(x, w_k)|, [N].

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        weight: [K, D], in the dtype of the features (under autocast both are cast to its dtype).

    Returns:
        [N] in [0, 1]; float32 (float64 for float64 features). High for in-distribution inputs of a collapsed
        classifier. The cosine of a row of zeros is 0, its gradient zero; K = 0 gives zeros. Products are formed
        before they are divided by the norms: in float32 these should lie between 1e-15 and 1e15.

    Differentiable once, in features and weight (Separation detaches the weight, which is up to its loss). The
    cosines [N, K] are never stored. On the CPU, where the weight needs no gradient, that of the features is formed with
    the value (of 16-bit features from 128 classes on) and waits for its upstream, [N, D] in the dtype of the value: two
    products instead of three, of which `torch.no_grad` saves one where no backward pass is to come. Raises TypeError or
    ValueError for an argument of the wrong kind or shape.

    Source: Wu et al., Pursuing Feature Separation based on Neural Collapse for OOD Detection, ICLR 2025.
    """
    check_matrix(features, "features")
    mixed = reference.autocasting(features)
    check_matrix(weight, "weight", "K, D")
    if weight.shape[1] != features.shape[1]:
        raise ValueError(f"weight: expected [K, {features.shape[1]}] as features are, got {list(weight.shape)}")
    check_beside(weight, "weight", features, "features", dtype=not mixed)
    features, weight = autocast(features, weight)
    backend = backend_for("subspace", features, len(weight))
    if backend == "reference":
        return reference.alignment(features, weight)
    if can_wait(backend, features, weight):
        return apply(WaitingScore, ALIGNMENT, features, weight)[0]
    return apply(Alignment, backend, features, weight)


def subspace_energy(features: Tensor, basis: Tensor) -> SubspaceEnergy:
    """Squared norms of each feature's projection onto a subspace and of what is left, |U^T x|^2 and |x - U U^T x|^2.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16.
        basis: [D, r], r >= 0: columns of `orthonormal_basis`, float32 or in the dtype of the features. The formulas
            hold as they are for a basis that is not orthonormal.

    Returns:
        `SubspaceEnergy(inside, outside)`, each [N]; float32 (float64 for float64 features), also under autocast. The
        complement is formed and then squared, so it is exact to rounding where nearly all of x lies inside
        (|x|^2 - |U^T x|^2 loses 6 digits where 1e-3 of the norm is outside).

    Differentiable twice, in features and basis. The projections [N, r] are never stored. Raises
    TypeError or ValueError for an argument of the wrong kind or shape.
    """
    check_matrix(features, "features")
    check_floating(basis, "basis")
    if basis.dim() != 2 or basis.shape[0] != features.shape[1]:
        raise ValueError(f"basis: expected [{features.shape[1]}, r] for features of that size, got {list(basis.shape)}")
    if features.dtype == torch.float64 and basis.dtype == torch.float32:
        basis = basis.double()  # orthonormal_basis gives float32
    if basis.dtype != score_dtype(features):
        check_beside(basis, "basis", features, "features")
    check_beside(basis, "basis", features, "features", dtype=False)
    backend = backend_for("subspace", features, basis.shape[1])
    if backend == "reference":
        return SubspaceEnergy(*reference.subspace_energy(features, basis))
    return SubspaceEnergy(*apply(Subspace, backend, features, basis))


@torch.no_grad()
def orthonormal_basis(weight: Tensor, rank: int | None = None) -> Tensor:
    """An orthonormal basis of the space that class weights span, in the order of their singular values, [D, r] float32.

    Args:
        weight: [K, D], the head's.
        rank: r, 0 <= r <= min(K, D); by default the numerical rank, the number of singular values above
            max(K, D) eps times the largest, eps that of the weight's dtype.

    Not differentiable. Computed in float64. Raises TypeError or ValueError for an argument of the wrong kind or shape.
    """
    check_matrix(weight, "weight", "K, D")
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank: expected an integer or None, got {type(rank).__name__}")
        if not 0 <= rank <= min(weight.shape):
            raise ValueError(f"rank: expected 0 to {min(weight.shape)} for weight {list(weight.shape)}, got {rank}")
    return reference.orthonormal_basis(weight, rank)


class Alignment(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, features: Tensor, weight: Tensor) -> Tensor:
        return raw(backend, "alignment", features, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend, features, weight = inputs
        ctx.save_for_backward(features, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        needs = ctx.needs_input_grad[1:3]
        return None, *wanted(apply(AlignmentGradient, ctx.backend, grad, *ctx.saved_tensors, needs[0], needs[1]), needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return rows_folded(Alignment, info, in_dims, arguments, by_row=(1,))


class AlignmentGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str, grad: Tensor, features: Tensor, weight: Tensor, for_features: bool, for_weight: bool
    ) -> tuple[Tensor, Tensor]:
        return raw(backend, "alignment_backward", grad, features, weight, for_features, for_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise no_second("alignment")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        if arguments[5]:
            return one_by_one(AlignmentGradient, info, in_dims, arguments)
        return rows_folded(AlignmentGradient, info, in_dims, arguments, by_row=(1, 2))


ALIGNMENT = Passes(
    lambda *tensors: raw("native", "alignment_foreseen", *tensors),
    lambda grad, value, *tensors: apply(AlignmentGradient, "native", grad, *tensors, True, False)[0],
)


class Subspace(torch.autograd.Function):
    @staticmethod
    def forward(backend: str, features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        return raw(backend, "subspace_energy", features, basis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, features, basis = inputs
        ctx.save_for_backward(features, basis)

    @staticmethod
    def backward(ctx: Any, grad_inside: Tensor, grad_outside: Tensor) -> tuple:
        needs = ctx.needs_input_grad[1:3]
        gradients = apply(
            SubspaceGradient, ctx.backend, grad_inside, grad_outside, *ctx.saved_tensors, needs[0], needs[1]
        )
        return None, *wanted(gradients, needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return rows_folded(Subspace, info, in_dims, arguments, by_row=(1,))


class SubspaceGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        grad_inside: Tensor,
        grad_outside: Tensor,
        features: Tensor,
        basis: Tensor,
        for_features: bool,
        for_basis: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (grad_inside, grad_outside, features, basis)
        return raw(backend, "subspace_energy_backward", *tensors, for_features, for_basis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, *tensors, a, b = inputs
        ctx.save_for_backward(*tensors)
        ctx.formed = (a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        given = [t if formed else None for t, formed in zip(cotangents, ctx.formed, strict=True)]
        if all(t is None for t in given):
            return (None,) * 7
        needs = ctx.needs_input_grad[3:5]
        inside, outside, *rest = apply(SubspaceCurvature, ctx.backend, *given, *ctx.saved_tensors, needs[0], needs[1])
        return None, inside, outside, *wanted(rest, needs), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        if arguments[6]:
            return one_by_one(SubspaceGradient, info, in_dims, arguments)
        return rows_folded(SubspaceGradient, info, in_dims, arguments, by_row=(1, 2, 3))


class SubspaceCurvature(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        features_cotangent: Tensor | None,
        basis_cotangent: Tensor | None,
        grad_inside: Tensor,
        grad_outside: Tensor,
        features: Tensor,
        basis: Tensor,
        for_features: bool,
        for_basis: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (features_cotangent, basis_cotangent, grad_inside, grad_outside, features, basis)
        return raw(backend, "subspace_energy_double_backward", *tensors, for_features, for_basis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise no_third("subspace_energy")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(SubspaceCurvature, info, in_dims, arguments)


def _per_row(features: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], dtype=score_dtype(features))


def _pair(features: Tensor, other: Tensor, for_features: bool, for_other: bool) -> tuple[Tensor, ...]:
    made = (gradient_like(features, for_features), gradient_like(other, for_other))
    return tuple(features.new_empty(0) if gradient is None else gradient for gradient in made)


register_fake("alignment", lambda features, weight: _per_row(features))
register_fake("alignment_foreseen", lambda x, w: (_per_row(x), x.new_empty(x.shape, dtype=score_dtype(x))))
register_fake("alignment_backward", lambda grad, *arguments: _pair(*arguments))
register_fake("subspace_energy", lambda features, basis: (_per_row(features), _per_row(features)))
register_fake("subspace_energy_backward", lambda grad_inside, grad_outside, *arguments: _pair(*arguments))
register_fake(
    "subspace_energy_double_backward",
    lambda v, c, grad_inside, grad_outside, features, *arguments: (
        *(_per_row(features), _per_row(features)),
        *_pair(features, *arguments),
    ),
)
