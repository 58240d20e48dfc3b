"""Room `heads`: losses of given logits whose slopes are known as soon as their values are.

With p = softmax(z), E = -logsumexp(z) and an upstream gradient g of a row:

    oe_head     logsumexp(z) - mean_c z_c           g (p_k - 1 / K)
    energy_head relu(E - margin)^2, side "in"       -2 g relu(E - margin) p_k
                relu(margin - E)^2, side "out"       2 g relu(margin - E) p_k
    bce_head    mean_c softplus(z_c) - y_c z_c      g (sigmoid(z_k) - y_k) / K

Where logits require a gradient, that for the g that is foreseen (1, unless told) is written while their rows are in
cache. The backward pass compares: as foreseen, the gradient is handed out as it is. Otherwise it is multiplied in place
(float32, float64), at the cost of a pass over it, or formed anew from the logits: of 16 bits it would be rounded a
second time and, in float16, might have left the range. So 16-bit gradients wait for the backward pass unless a g is
told. Under torch.compile and torch.func, where an upstream cannot be looked at, all do. On a GPU all wait unless a g is
told, and the comparison is the device's own: it forms anew the rows whose g is another, and leaves the others alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import DTYPES, backend_for
from oodkern.ops._autograd import _over_rows, apply, formed_with_values, readable
from oodkern.ops._checks import check_logits, check_margin, check_tensor, score_dtype
from oodkern.ops._foreseen import factor_of
from oodkern.ops._product import check_beside, no_second, raw, register_fake

LABELS = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def oe_head(logits: Tensor, *, upstream: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of each row to the uniform distribution, logsumexp(z) - mean_c z_c: Outlier Exposure's loss.

    Args:
        logits: [..., K], float64, float32, bfloat16 or float16; any strides (rows that are not dense, or not evenly
            spaced, are copied first).
        upstream: the slope that the loss made of the result will have in it, where that is known: a number for all
            rows, such as weight / N for weight times a mean, or [...] in the dtype of the result. The gradient is then
            formed with the value, in any dtype, and not touched again. Another slope than that costs time, and
            nothing else.

    Returns:
        [...], in nats, at least log K; float32 (float64 for float64 logits), also under autocast. +inf for a row that
        holds -inf, whose gradient counts that logit's p as 0; NaN, and a row that holds +inf, give NaN in that row.

    Differentiable once, in `logits`; the gradient has their dtype, and is formed with the value where they require it
    (of 16 bits, or on a GPU, with `upstream` alone; not under torch.compile, torch.func or saved-tensor hooks). Raises
    TypeError or ValueError for an argument of the wrong kind or shape.

    Source: Hendrycks, Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019.
    """
    check_logits(logits)
    upstream = _foreseen(upstream, logits)
    if backend_for("heads", logits) == "reference":
        return reference.oe_head(logits)
    return _apply("oe", logits, None, 0.0, upstream)


def energy_head(logits: Tensor, margin: float, side: str, *, upstream: Tensor | float | None = None) -> Tensor:
    """Squared hinge of each row's energy E = -logsumexp(z): relu(E - margin)^2 or relu(margin - E)^2.

    Args:
        logits: [..., K]; dtypes and strides as in `oe_head`.
        margin: a finite number, in units of the logits.
        side: "in" for in-distribution rows, whose energies are to stay below the margin; "out" for outliers, whose
            energies are to stay above it.
        upstream: as in `oe_head`.

    Returns:
        [...], in units of the logits squared, never negative; float32 (float64 for float64 logits), also under
        autocast. A row of all -inf has E = +inf and gradient zero; NaN stays in its row.

    Differentiable once, as `oe_head` is. Raises TypeError or ValueError for an argument of the wrong kind or shape.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_logits(logits)
    margin = check_margin(margin)
    if side not in ("in", "out"):
        raise ValueError(f"side: expected 'in' or 'out', got {side!r}")
    upstream = _foreseen(upstream, logits)
    if backend_for("heads", logits) == "reference":
        return reference.energy_head(logits, margin, side)
    return _apply(f"energy_{side}", logits, None, margin, upstream)


def bce_head(logits: Tensor, target: Tensor, *, upstream: Tensor | float | None = None) -> Tensor:
    """Binary cross-entropy of each row, the mean over its labels: mean_c softplus(z_c) - y_c z_c.

    Args:
        logits: [..., K], one logit a label; dtypes and strides as in `oe_head`.
        target: [..., K] in the shape of the logits: labels 0 and 1, or anything between; bool, integers or any of the
            logits' dtypes, read as they are. Their values are not looked at. Must not require a gradient.
        upstream: as in `oe_head`.

    Returns:
        [...], in nats; float32 (float64 for float64 logits), also under autocast. Labels of 0 and 1 leave nothing to
        cancel, in the value or in the gradient, and infinite logits on their label's side count 0. NaN stays in its
        row.

    Differentiable once, in `logits`, as `oe_head` is. Raises TypeError or ValueError for an argument of the wrong kind
    or shape, ValueError for a target that requires a gradient.
    """
    check_logits(logits)
    check_tensor(target, "target")
    if target.shape != logits.shape:
        raise ValueError(f"target: expected {list(logits.shape)} as logits are, got {list(target.shape)}")
    if target.dtype not in LABELS:
        name = str(target.dtype).removeprefix("torch.")
        raise TypeError(f"target: expected bool, integers or a floating dtype of logits, got {name}")
    check_beside(target, "target", logits, "logits", dtype=False)
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("target: expected a tensor that requires no gradient, as it gets none; pass target.detach()")
    upstream = _foreseen(upstream, logits)
    if backend_for("heads", logits) == "reference":
        return reference.bce_head(logits, target)
    return _apply("bce", logits, target, 0.0, upstream)


def _foreseen(value: Any, logits: Tensor) -> Tensor | None:
    """As [...], at no memory for a number; None where no gradient is to be formed with the value."""
    dtype, rows = score_dtype(logits), logits.shape[:-1]
    if isinstance(value, Tensor):
        if value.shape != rows or value.dtype != dtype:
            name, given = (str(one).removeprefix("torch.") for one in (dtype, value.dtype))
            raise ValueError(
                f"upstream: expected {list(rows)} of {name}, one number a row, got {list(value.shape)} of {given}"
            )
        check_beside(value, "upstream", logits, "logits", dtype=False)
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"upstream: expected a number or a tensor, got {type(value).__name__}")
    if not formed_with_values(logits):
        return None
    if isinstance(value, Tensor):
        return value.detach()
    if value is None and (logits.dtype not in (torch.float64, torch.float32) or would_wait(logits)):
        return None
    return torch.full((), 1.0 if value is None else value, dtype=dtype, device=logits.device).expand(rows)


def _apply(head: str, logits: Tensor, target: Tensor | None, margin: float, upstream: Tensor | None) -> Tensor:
    return apply(Head, "native", head, logits, target, margin, upstream)[0]


def would_wait(tensor: Tensor) -> bool:
    """Whether looking at numbers waits for a device, which nothing may under a CUDA graph's capture."""
    return tensor.is_cuda


def _correction(grad: Tensor, foreseen: Tensor, dtype: torch.dtype) -> Tensor | float | None:
    """What a gradient that was formed for the foreseen upstream lacks; None where it is to be formed anew.

    A rounding of the upstream, such as that of weight / N, is not looked at.
    """
    eps = torch.finfo(foreseen.dtype).eps
    if bool(((grad - foreseen).abs() <= 2 * eps * foreseen.abs()).all()):
        return 1.0
    if dtype == torch.float16:
        return None
    if bool((foreseen == 1).all()) and dtype != torch.bfloat16:
        return grad.unsqueeze(-1)
    flat = foreseen.reshape(-1)
    return factor_of(grad.reshape(-1), flat, flat, dtype == torch.bfloat16)


class Head(torch.autograd.Function):
    """Value, what the gradient needs of a row, and the gradient for upstream 1; only the value is differentiable."""

    @staticmethod
    def forward(
        backend: str, head: str, logits: Tensor, target: Tensor | None, margin: float, upstream: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return raw(backend, "head", head, logits, target, margin, upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, ctx.head, logits, target, ctx.margin, upstream = inputs
        _, rows, gradient = output
        ctx.save_for_backward(logits, target, rows, upstream)
        ctx.mark_non_differentiable(rows, gradient)
        ctx.set_materialize_grads(False)
        # Handed out once, multiplied in place; a second backward pass forms it anew.
        ctx.gradient = None if upstream is None else gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None or not ctx.needs_input_grad[2]:
            return (None,) * 6
        *saved, foreseen = ctx.saved_tensors
        formed, ctx.gradient = ctx.gradient, None
        if formed is not None and not torch.is_grad_enabled() and readable(grad):
            if would_wait(grad):
                raw(ctx.backend, "head_mend", ctx.head, formed, grad, foreseen, *saved[:2], ctx.margin, saved[2])
                return None, None, formed, None, None, None
            correction = _correction(grad, foreseen, formed.dtype)
            if correction is not None:
                if not isinstance(correction, float) or correction != 1.0:
                    formed.mul_(correction)
                return None, None, formed, None, None, None
        del formed
        gradient = apply(HeadGradient, ctx.backend, ctx.head, grad, *saved, ctx.margin)
        return None, None, gradient, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(Head, info, in_dims, arguments)


class HeadGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str, head: str, grad: Tensor, logits: Tensor, target: Tensor | None, rows: Tensor, margin: float
    ) -> Tensor:
        return raw(backend, "head_backward", head, grad, logits, target, margin, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.head = inputs[1].partition("_")[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise no_second(f"{ctx.head}_head")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(HeadGradient, info, in_dims, arguments)


def _fake_head(
    head: str, logits: Tensor, target: Tensor | None, margin: float, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], score_dtype(logits)
    rows = logits.new_empty((*lead, 3 if target is None else 0), dtype=dtype)
    gradient = logits.new_empty((*lead, 0 if upstream is None else logits.shape[-1]))
    return logits.new_empty(lead, dtype=dtype), rows, gradient


def _fake_gradient(head: str, grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("head", _fake_head)
register_fake("head_backward", _fake_gradient)
register_fake("head_mend", lambda *_: None)
