"""Room `norm`: the L2 norm of each sample.

With n = ||x|| and u = x / n (0 where n is 0), an upstream gradient g and a cotangent t of the gradient:

    dn/dx = g u
    d(g u) . t = (dg: t . u,  dx: g (t - (t . u) u) / n)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from oodkern import _native, reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import RowScore, apply, register_row_score_fakes
from oodkern.ops._checks import check_floating, score_dtype


def sample_norm(x: Tensor) -> Tensor:
    """L2 norm of each sample, ||x_i|| = sqrt(sum of the squares of all its elements), [N].

    Args:
        x: [N, ...], float64, float32, bfloat16 or float16. Read in place where the elements of a sample are dense in
            some order (contiguous, channels last) and samples are evenly spaced, and copied first elsewhere.

    Returns:
        [N], in units of x; float32 (float64 for float64 x), also under autocast. Squares are added up in double (of 16
        bits four at a time in float32, which holds each), so neither overflows nor underflows where the norm does not.
        The norm of a sample without elements is 0; NaN stays in its sample.

    Differentiable twice, in `x`; both derivatives are 0 where the norm is 0, and gradients have the dtype of x. The
    gradient of a sample that holds an infinity is undefined. Raises TypeError or ValueError for an argument of the
    wrong kind or shape.
    """
    check_samples(x)
    if backend_for("norm", x) == "reference":
        return reference.sample_norm(x)
    return apply(RowScore, "sample_norm", True, _as_rows(x), None)


def check_samples(value: Any, name: str = "x") -> None:
    check_floating(value, name)
    if value.dim() == 0:
        raise ValueError(f"{name}: expected [N, ...], got a tensor without dimensions")


def _as_rows(x: Tensor) -> Tensor:
    """[N, elements of a sample], in the order in which they lie in memory: a view of channels-last tensors too."""
    if x.dim() == 1:
        return x[:, None]
    if x.dim() > 2 and not x.is_contiguous():
        order: list[int] = []  # by comparisons alone: under torch.compile strides may be symbolic
        for dim in range(1, x.dim()):
            before = [i for i in order if x.stride(i) >= x.stride(dim)]
            order.insert(len(before), dim)
        x = x.permute(0, *order)
    return x.flatten(1)


if not _native.missing["cpu"]:
    register_row_score_fakes("sample_norm", score_dtype)
