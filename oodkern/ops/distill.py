"""Room `distill`: what a student's logits lack of a teacher's.

With p = softmax(t / T) of the teacher and q = softmax(s / T) of the student, u = log(p / q) and an upstream g:

    value = T^2 sum_k p_k u_k = T^2 sum_k (q_k - p_k + p_k u_k), of which no term is negative (see csrc/reduce.h)
    d/ds  = g T (q - p)

T^2 keeps the gradient of the size of an undistilled one whatever the temperature. The gradient needs four numbers a
row beside the logits: maximum and reciprocal sum of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import _over_rows, apply
from oodkern.ops._checks import check_logits, check_temperature, score_dtype
from oodkern.ops._product import check_beside, no_second, raw, register_fake


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row: the loss of knowledge distillation.

    Args:
        student_logits: [..., K], float64, float32, bfloat16 or float16; any strides (rows that are not dense, or
            not evenly spaced, are copied first).
        teacher_logits: [..., K], in the shape of the student's. Its dtype may be another one, since each is
            widened for itself, except that float64 goes with float64 alone. Must not require a gradient, which it
            would not get: pass `teacher_logits.detach()`, or compute it under `torch.no_grad()`.
        temperature: T > 0, in units of the logits.

    Returns:
        [...], in nats times T^2, never negative; float32 (float64 for float64 logits), also under autocast. Exactly 0
        for equal rows of one dtype, and relatively accurate near that, where sum p log(p / q) as written cancels. A
        class that the teacher gives -inf counts 0 whatever the student gives it; +inf where the student gives -inf to a
        class and the teacher does not (float32 shares of the teacher's under 2^-126 may count 0). A teacher's row of
        all -inf gives 0 and gradient zero. NaN, and a row that holds +inf, give NaN in that row alone.

    Differentiable once, in `student_logits`; the gradient has its dtype. Raises TypeError or ValueError for an argument
    of the wrong kind or shape, ValueError for a teacher that requires a gradient.

    Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    check_logits(student_logits, "student_logits")
    check_logits(teacher_logits, "teacher_logits")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits: expected {list(student_logits.shape)} as student_logits are, "
            f"got {list(teacher_logits.shape)}"
        )
    mixed = score_dtype(student_logits) == score_dtype(teacher_logits)
    check_beside(teacher_logits, "teacher_logits", student_logits, "student_logits", dtype=not mixed)
    if teacher_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits: expected a tensor that requires no gradient, since the teacher gets none; pass "
            "teacher_logits.detach(), or compute it under torch.no_grad()"
        )
    temperature = check_temperature(temperature)
    backend = backend_for("distill", student_logits)
    if backend == "reference":
        return reference.distillation(student_logits, teacher_logits, temperature)
    return apply(Distillation, backend, student_logits, teacher_logits, temperature)[0]


class Distillation(torch.autograd.Function):
    """Value, and what the gradient needs of a row; only the value is differentiable."""

    @staticmethod
    def forward(backend: str, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return raw(backend, "distillation", student, teacher, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, student, teacher, ctx.temperature = inputs
        _, shares = output
        ctx.save_for_backward(student, teacher, shares)
        ctx.mark_non_differentiable(shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        return None, apply(DistillationGradient, ctx.backend, grad, *ctx.saved_tensors, ctx.temperature), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(Distillation, info, in_dims, arguments)


class DistillationGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str, grad: Tensor, student: Tensor, teacher: Tensor, shares: Tensor, temperature: float
    ) -> Tensor:
        return raw(backend, "distillation_backward", grad, student, teacher, shares, temperature)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise no_second("distillation")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return _over_rows(DistillationGradient, info, in_dims, arguments)


def _fake_distillation(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = score_dtype(student)
    return student.new_empty(student.shape[:-1], dtype=dtype), student.new_empty((*student.shape[:-1], 4), dtype=dtype)


def _fake_gradient(grad: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


register_fake("distillation", _fake_distillation)
register_fake("distillation_backward", _fake_gradient)
