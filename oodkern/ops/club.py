"""Room `contrast`: CLUB, an upper bound of mutual information, in closed form.

With ybar and v the mean and the variance of each column of the target, c = y - ybar, m = mean - ybar and
w = exp(-log_variance), the pairs of rows need not be formed: mean_j (y_j - mean_i)^2 = v + m_i^2, so that

    L = (1/N) sum_i sum_d (v + c (2 m - c)) w / 2
    dL/dmean = c w / N          dL/dlog_variance = -(v + c (2 m - c)) w / (2 N)
    dL/dy_i  = ((m_i - c_i) w_i + abar c_i - mbar) / N,   abar = mean_i w_i,  mbar = mean_i m_i w_i

Everything is centered: as usually written, mean_j y_j^2 - y_i^2, it cancels where y is far from 0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import apply
from oodkern.ops._checks import score_dtype
from oodkern.ops._product import (
    check_beside,
    check_matrix,
    gradient_like,
    no_second,
    one_by_one,
    raw,
    register_fake,
    wanted,
)


def club(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """CLUB bound of the mutual information of the target y and what q(y | x) = N(mean, exp(log_variance)) was made of.

    L = (1/N) sum_i [ log q(y_i | x_i) - (1/N) sum_j log q(y_j | x_i) ]
      = (1/N) sum_i sum_d [ (1/N) sum_j (y_jd - mean_id)^2 - (y_id - mean_id)^2 ] / (2 exp(log_variance_id))

    Args:
        mean: [N, D], float64, float32, bfloat16 or float16.
        log_variance: [N, D], in the dtype of the mean, in nats. Under exp(-log_variance) = 2^-126 a weight is 0.
        target: [N, D], in the dtype of the mean, row i beside row i of the mean. (Under autocast dtypes may differ:
            the widest is taken, and nothing is rounded.)

    Returns:
        A scalar in nats; float32 (float64 for float64 inputs), also under autocast. 0 where N is 0. A NaN or an
        infinity makes it NaN or infinite, and reaches the gradients of its columns alone.

    Differentiable once, in all three; gradients have the dtype of their input. Memory and time are those of N x D:
    the [N, N, D] differences of the definition are never formed. An upper bound only where q is fitted by maximum
    likelihood; it may be negative elsewhere. Raises TypeError or ValueError for an argument of the wrong kind or shape.

    Source: Cheng et al., CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information, ICML 2020.
    """
    check_matrix(mean, "mean")
    mixed = reference.autocasting(mean)
    for value, name in ((log_variance, "log_variance"), (target, "target")):
        check_matrix(value, name)
        if value.shape != mean.shape:
            raise ValueError(f"{name}: expected {list(mean.shape)} as mean is, got {list(value.shape)}")
        check_beside(value, name, mean, "mean", dtype=not mixed)
    if mixed:
        dtype = functools.reduce(torch.promote_types, (mean.dtype, log_variance.dtype, target.dtype))
        mean, log_variance, target = mean.to(dtype), log_variance.to(dtype), target.to(dtype)
    backend = backend_for("club", mean, 0)
    if backend == "reference":
        return reference.club(mean, log_variance, target)
    return apply(Club, backend, mean, log_variance, target)[0]


class Club(torch.autograd.Function):
    """The bound, and of each column what the gradients need, [5, D]."""

    @staticmethod
    def forward(backend: str, mean: Tensor, log_variance: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return raw(backend, "club", mean, log_variance, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, *tensors = inputs
        columns = output[1]
        ctx.save_for_backward(*tensors, columns)
        ctx.mark_non_differentiable(columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        needs = tuple(ctx.needs_input_grad[1:])
        gradients = apply(ClubGradient, ctx.backend, grad, *ctx.saved_tensors, *needs)
        return None, *wanted(gradients, needs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(Club, info, in_dims, arguments)


class ClubGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        grad: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        target: Tensor,
        columns: Tensor,
        for_mean: bool,
        for_log_variance: bool,
        for_target: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad, mean, log_variance, target, columns)
        return raw(backend, "club_backward", *tensors, for_mean, for_log_variance, for_target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise no_second("club")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(ClubGradient, info, in_dims, arguments)


def _fake_club(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = score_dtype(mean)
    return mean.new_empty((), dtype=dtype), mean.new_empty((5, mean.shape[1]), dtype=dtype)


def _fake_gradient(grad: Tensor, mean: Tensor, log_variance: Tensor, target: Tensor, *rest: Any) -> tuple:
    made = [gradient_like(t, needed) for t, needed in zip((mean, log_variance, target), rest[1:], strict=True)]
    return tuple(mean.new_empty(0) if gradient is None else gradient for gradient in made)


register_fake("club", _fake_club)
register_fake("club_backward", _fake_gradient)
