"""Norms of the gradients of scores in their inputs, and the penalty on them.

With G_i = d score_i / d x_i, n_i = ||G_i|| and u_i = G_i / n_i held fixed, the penalty P = sum_i w_i n_i has

    dP / d theta = sum_i w_i d/d theta (u_i . G_i)

which is formed by differentiating G_i (exact), or by differentiating scores at x_i +- h_i u_i (finite differences):
u_i . G_i = (score(x_i + h_i u_i) - score(x_i - h_i u_i)) / 2 h_i + O(h_i^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oodkern.ops._checks import check_floating, check_tensor, is_fake, score_dtype
from oodkern.ops._penalty import SCALE, Work, check_score, input_gradient, name_of
from oodkern.ops._product import check_beside
from oodkern.ops._score_graph import running_statistics
from oodkern.ops.norm import check_samples, sample_norm

CHUNK = 32  # rows


def input_gradient_norm(score: Tensor, inputs: Tensor, create_graph: bool = False) -> Tensor:
    """||d score_i / d inputs_i|| of a graph that exists already, [N].

    Args:
        score: [N], float64, float32, bfloat16 or float16, computed from `inputs`. Where its rows are coupled, as by
            batch normalisation on batch statistics, row i is the norm of d (sum_j score_j) / d inputs_i.
        inputs: [N, ...], which required a gradient when the score was computed.
        create_graph: make the norms differentiable, once; scaled_dot_product_attention can be differentiated twice
            with `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the forward pass alone.

    Returns:
        [N], in units of the score per unit of the inputs; float32 (float64 for float64 inputs). The score is scaled
        inside the gradient and the norm scaled back, so that float16 layers do not round it to zero. The graph of the
        score is kept.

    Raises TypeError or ValueError for an argument of the wrong kind or shape, or where no gradient leads from the score
    to the inputs.
    """
    check_samples(inputs, "inputs")
    check_score(score, len(inputs), "score")
    if not inputs.requires_grad:
        raise ValueError("inputs: expected a tensor that required a gradient when the score was computed")
    return sample_norm(input_gradient(score, inputs, "score", create_graph, retain_graph=True)) * (1 / SCALE)


def gradient_penalty(
    score_fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    weight: Tensor,
    second_order: str = "exact",
    step: float = 1e-2,
    chunk: int | None = None,
    allow_kinks: bool = False,
) -> Tensor:
    """Weighted norms of the input gradients of a score, sum_i w_i ||d score_fn(x)_i / d x_i||, a scalar.

    Only rows of non-zero weight are forwarded, `chunk` at a time, with batch normalisation on its running statistics;
    where all weights are zero score_fn is not called. Each chunk's gradient in the parameters is formed at once and
    handed out by the backward pass, so that memory is one chunk's, and a gradient's, however many rows there are.

    Args:
        score_fn: a function (a module, a method) from inputs [n, ...] to scores [n] whose rows do not see one another.
            Batch normalisation is found in modules that it calls. A module that keeps no running statistics couples
            the rows of a chunk; torch.nn.functional.batch_norm on batch statistics is refused.
        inputs: [N, ...], float64, float32, bfloat16 or float16. No gradient is formed in them.
        weight: [N], bool or floating, any sign, without a gradient of its own.
        second_order: "exact" differentiates the gradient: every op has to be differentiable twice, and
            scaled_dot_product_attention is computed by its math backend, which is; on the CPU the derivatives of
            convolutions are formed by other, faster kernels than PyTorch's double backward, of the same numbers.
            "finite_difference" differentiates scores at x +- h u instead, u the gradient's direction and h = step
            ||x||: first derivatives alone, at the memory of a plain forward and backward pass, so that flash attention
            and torch.compile work. It is an estimate, of relative error about step^2 for smooth networks in float32,
            and wrong where derivatives jump. Random numbers (dropout) are the same at all points.
        step: of finite differences, relative to the norm of each input. In float32 the error is least near 1e-2.
        chunk: rows forwarded at a time; 32 unless told.
        allow_kinks: let finite differences pass over ReLU, ELU, max-pooling and the like, whose first or second
            derivative jumps. torch.where cannot be told from a mask and is never refused.

    Returns:
        A scalar, float32 (float64 for float64 inputs): the norms are those at x, whatever `second_order` is. Zero, with
        a graph, where all weights are.

    Differentiable once, in all leaves that score_fn uses and that require a gradient. Raises TypeError or ValueError
    for an argument of the wrong kind or shape; RuntimeError where finite differences meet a jump. Warns where they
    meet compiled code, into which they cannot see.

    Source: Sharifi et al., Gradient-Regularized Out-of-Distribution Detection, ECCV 2024, which differentiates twice.
    """
    if torch.compiler.is_compiling():  # breaks the graph here: what is compiled cannot be differentiated twice
        return torch.compiler.disable(_penalty)(score_fn, inputs, weight, second_order, step, chunk, allow_kinks)
    return _penalty(score_fn, inputs, weight, second_order, step, chunk, allow_kinks)


def _penalty(
    score_fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    weight: Tensor,
    second_order: str,
    step: float,
    chunk: int | None,
    allow_kinks: bool,
) -> Tensor:
    weight = _check_arguments(score_fn, inputs, weight, second_order, step, chunk)
    work = Work(score_fn, torch.is_grad_enabled(), second_order == "exact", step, allow_kinks)
    total = torch.zeros((), dtype=weight.dtype, device=inputs.device)
    rows = weight.nonzero().squeeze(1)
    if len(rows):
        parts = rows.split(CHUNK if chunk is None else chunk)
        with torch.enable_grad(), running_statistics(score_fn):
            # A fake step tells of memory alone, and that of all chunks but the first is the second one's.
            for part in parts[:2] if is_fake(inputs) else parts:
                total += work.chunk(inputs.detach()[part].requires_grad_(), weight[part])
    anchor = torch.zeros_like(total, requires_grad=True)  # so that a zero, too, can be sent backward
    return HandOut.apply(total, list(work.gradients.values()), anchor, *work.gradients)


class HandOut(torch.autograd.Function):
    """A value whose gradients in leaves are there already. Never compiled, so `forward` may take *leaves."""

    @staticmethod
    def forward(value: Tensor, gradients: list[Tensor], anchor: Tensor, *leaves: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.gradients, _, *leaves = inputs
        ctx.dtypes = [leaf.dtype for leaf in leaves]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        handed = (
            (gradient * grad.to(gradient.device)).to(dtype) if needed else None
            for gradient, dtype, needed in zip(ctx.gradients, ctx.dtypes, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, None, *handed


def _check_arguments(score_fn: Any, inputs: Any, weight: Any, second_order: Any, step: Any, chunk: Any) -> Tensor:
    """Raises for what is wrong; gives the weights in the dtype of the norms."""
    if not callable(score_fn):
        raise TypeError(f"score_fn: expected a function from inputs to scores, got {type(score_fn).__name__}")
    check_samples(inputs, "inputs")
    check_tensor(weight, "weight")
    if weight.dtype != torch.bool:
        check_floating(weight, "weight")
    if tuple(weight.shape) != (len(inputs),):
        raise ValueError(f"weight: expected [{len(inputs)}], one number a row of inputs, got {list(weight.shape)}")
    check_beside(weight, "weight", inputs, "inputs", dtype=False)
    if weight.requires_grad:
        raise ValueError("weight: expected a tensor without a gradient, since none is formed in it; detach it")
    if second_order not in ("exact", "finite_difference"):
        raise ValueError(f"second_order: expected 'exact' or 'finite_difference', got {second_order!r}")
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise TypeError(f"step: expected a number, got {type(step).__name__}")
    if not 0 < step < math.inf:
        raise ValueError(f"step: expected a positive number, got {step}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
        raise TypeError(f"chunk: expected a number of rows or None, got {type(chunk).__name__}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected a number of rows, at least 1, got {chunk}")
    if second_order == "finite_difference" and inputs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"inputs: expected float32, by which finite differences step, got {name_of(inputs.dtype)}")
    return weight.to(score_dtype(inputs))
