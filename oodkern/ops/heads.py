"""Training heads of room `energy`: losses of given logits whose slopes are known as soon as their values are.

With p = softmax(z), E = -logsumexp(z) and an upstream gradient g of a row:

    oe_head     logsumexp(z) - mean_c z_c           g (p_k - 1 / K)
    energy_head relu(E - margin)^2, side "in"       -2 g relu(E - margin) p_k
                relu(margin - E)^2, side "out"       2 g relu(margin - E) p_k
    bce_head    mean_c softplus(z_c) - y_c z_c      g (sigmoid(z_k) - y_k) / K

Where logits require a gradient, that for g = 1 is written while their rows are in cache, and the backward pass multiplies
it by g, in place. Not so in 16 bits, where it would be rounded a second time and, in float16, leave the range before g
brings it back; nor under torch.compile and torch.func. There the backward pass reads the logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import DTYPES, backend_for
from oodkern.ops._autograd import _over_rows
from oodkern.ops._checks import check_logits, check_tensor, score_dtype
from oodkern.ops._product import check_beside, no_second, raw, register_fake

LABELS = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def oe_head(logits: Tensor) -> Tensor:
    """Cross-entropy of each row to the uniform distribution, logsumexp(z) - mean_c z_c: Outlier Exposure's loss.

    Args:
        logits: [..., K], float64, float32, bfloat16 or float16; any strides (rows that are not dense, or not evenly
            spaced, are copied first).

    Returns:
        [...], in nats, at least log K; float32 (float64 for float64 logits), also under autocast. +inf for a row that
        holds -inf, whose gradient counts that logit's p as 0; NaN, and a row that holds +inf, give NaN in that row.

    Differentiable once, in `logits`; the gradient has their dtype, and is formed with the value where they require it
    (float64 and float32, not under torch.compile or torch.func). Raises TypeError or ValueError for an argument of the
    wrong kind or shape.

    Source: Hendrycks, Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019.
    """
    check_logits(logits)
    if backend_for("energy", logits) == "reference":
        return reference.oe_head(logits)
    return _apply("oe", logits, None, 0.0)


def energy_head(logits: Tensor, margin: float, side: str) -> Tensor:
    """Squared hinge of each row's energy E = -logsumexp(z): relu(E - margin)^2 or relu(margin - E)^2.

    Args:
        logits: [..., K]; dtypes and strides as in `oe_head`.
        margin: a finite number, in units of the logits.
        side: "in" for in-distribution rows, whose energies are to stay below the margin; "out" for outliers, whose
            energies are to stay above it.

    Returns:
        [...], in units of the logits squared, never negative; float32 (float64 for float64 logits), also under
        autocast. A row of all -inf has E = +inf and gradient zero; NaN stays in its row.

    Differentiable once, as `oe_head` is. Raises TypeError or ValueError for an argument of the wrong kind or shape.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    check_logits(logits)
    margin = _check_margin(margin)
    if side not in ("in", "out"):
        raise ValueError(f"side: expected 'in' or 'out', got {side!r}")
    if backend_for("energy", logits) == "reference":
        return reference.energy_head(logits, margin, side)
    return _apply(f"energy_{side}", logits, None, margin)


def bce_head(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each row, the mean over its labels: mean_c softplus(z_c) - y_c z_c.

    Args:
        logits: [..., K], one logit a label; dtypes and strides as in `oe_head`.
        target: [..., K] in the shape of the logits: labels 0 and 1, or anything between; bool, integers or any of the
            logits' dtypes, read as they are. Their values are not looked at. Must not require a gradient.

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
        raise ValueError("target: expected a tensor that requires no gradient, since it gets none; pass target.detach()")
    if backend_for("energy", logits) == "reference":
        return reference.bce_head(logits, target)
    return _apply("bce", logits, target, 0.0)


def _check_margin(value: Any) -> float:
    """Comparisons alone, no math.isfinite: under torch.compile the value may be symbolic."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"margin: expected a number, got {type(value).__name__}")
    if not -1e30 <= value <= 1e30:  # its square is to stay finite in float64
        raise ValueError(f"margin: expected a finite number (between -1e30 and 1e30), got {value}")
    return float(value)


def _apply(head: str, logits: Tensor, target: Tensor | None, margin: float) -> Tensor:
    with_value = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and logits.dtype in (torch.float64, torch.float32)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    return Head.apply("native", head, logits, target, margin, with_value)[0]


class Head(torch.autograd.Function):
    """Value, what the gradient needs of a row, and the gradient for upstream 1; only the value is differentiable."""

    @staticmethod
    def forward(
        backend: str, head: str, logits: Tensor, target: Tensor | None, margin: float, with_value: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return raw(backend, "head", head, logits, target, margin, with_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, ctx.head, logits, target, ctx.margin, with_value = inputs
        _, rows, gradient = output
        ctx.save_for_backward(logits, target, rows)
        ctx.mark_non_differentiable(rows, gradient)
        ctx.set_materialize_grads(False)
        # Handed out once, multiplied in place; a second backward pass forms it anew.
        ctx.gradient = gradient if with_value else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None or not ctx.needs_input_grad[2]:
            return (None,) * 6
        formed, ctx.gradient = ctx.gradient, None
        if formed is None or torch.is_grad_enabled():
            formed = HeadGradient.apply(ctx.backend, ctx.head, grad, *ctx.saved_tensors, ctx.margin)
        elif not bool((grad == 1).all()):
            formed.mul_(grad.unsqueeze(-1))
        return None, None, formed, None, None, None

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
    head: str, logits: Tensor, target: Tensor | None, margin: float, for_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lead, dtype = logits.shape[:-1], score_dtype(logits)
    rows = logits.new_empty((*lead, 3 if target is None else 0), dtype=dtype)
    gradient = logits.new_empty((*lead, logits.shape[-1] if for_logits else 0))
    return logits.new_empty(lead, dtype=dtype), rows, gradient


def _fake_gradient(head: str, grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("head", _fake_head)
register_fake("head_backward", _fake_gradient)
