"""The autograd of room `contrast`.

InfoNCE with s_ij = r_i c_j (q_i . k_j) / T, r and c the reciprocal norms (1 without normalising), rows' and columns'
logsumexp L_i and C_j, and the derivative G_ij of the weighted losses in s_ij, one tile of which is formed at a time:

    G_ij = a_i (exp(s_ij - L_i) - [j is i's positive]) + b_j (exp(s_ij - C_j) - [i is j's positive])
    dq_i = r_i sum_j G_ij c_j k_j / T,  less its part along q_i where rows are normalised; dk_j alike
    dT   = -(1 / T) sum_ij G_ij s_ij

The product of queries and keys is formed once for the value and once for all gradients; or once for both, where the
upstream a_i is known to be a factor of a row, or of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern.ops._autograd import apply, formed_with_values, readable
from oodkern.ops._checks import score_dtype
from oodkern.ops._foreseen import pays_to_wait
from oodkern.ops._product import gradient_like, no_second, one_by_one, raw, register_fake, wanted


class InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        queries: Tensor,
        keys: Tensor,
        target: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        temperature: Tensor,
        normalize: bool,
        symmetric: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels = (target, query_labels, key_labels)
        return raw(backend, "info_nce", queries, keys, *labels, temperature, normalize, symmetric)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, *tensors, ctx.normalize, ctx.symmetric = inputs
        _, query_lse, key_lse = output
        ctx.save_for_backward(*tensors, query_lse, key_lse)
        ctx.mark_non_differentiable(query_lse, key_lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        needs = ctx.needs_input_grad
        for_queries, for_keys, for_temperature = needs[1], needs[2], needs[6]
        queries, keys, temperature = apply(
            InfoNCEGradient, ctx.backend, grad, *ctx.saved_tensors, ctx.normalize, ctx.symmetric, for_queries, for_keys
        )
        a, b, t = wanted((queries, keys, temperature), (for_queries, for_keys, for_temperature))
        return None, a, b, None, None, None, t, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(InfoNCE, info, in_dims, arguments)


def can_wait(backend: str, queries: Tensor, keys: Tensor, temperature: Tensor) -> bool:
    """Whether gradients are to be formed before their upstream is known."""
    on_cpu = backend == "native" and queries.device.type == "cpu"
    return on_cpu and pays_to_wait(queries, len(keys)) and formed_with_values(queries, keys, temperature)


class WaitingInfoNCE(torch.autograd.Function):
    """Losses with the gradients of their sum, which wait for the number that they are multiplied by."""

    @staticmethod
    def forward(
        queries: Tensor,
        keys: Tensor,
        target: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        temperature: Tensor,
        normalize: bool,
        for_queries: bool,
        for_keys: bool,
    ) -> tuple[Tensor, ...]:
        tensors = (queries, keys, target, query_labels, key_labels, temperature)
        return raw("native", "info_nce_foreseen", *tensors, normalize, for_queries, for_keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.normalize, _, _ = inputs
        _, lse, *gradients = output
        ctx.save_for_backward(*tensors, lse)
        ctx.mark_non_differentiable(lse, *gradients)
        ctx.set_materialize_grads(False)
        # Handed out once, multiplied in place; there are none where rows of scores are too long.
        ctx.gradients = gradients if gradients[2].dim() == 0 else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:
            return (None,) * 9
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 5)]
        gradients, ctx.gradients = ctx.gradients, None
        found: list[Tensor | None] = [None, None, None]
        if gradients is not None and not torch.is_grad_enabled() and readable(grad):
            if len(grad) and bool((grad == grad[0]).all()):
                found = [
                    gradient.mul_(grad[0]) if needed else None
                    for gradient, needed in zip(gradients, needs, strict=True)
                ]
            elif needs[0]:
                found[0] = gradients[0].mul_(grad.unsqueeze(1))
        del gradients
        missing = [needed and one is None for needed, one in zip(needs, found, strict=True)]
        if any(missing):
            *tensors, lse = ctx.saved_tensors
            anew = apply(
                *(InfoNCEGradient, "native", grad, *tensors, lse.detach(), lse.new_empty(0), ctx.normalize, False),
                *missing[:2],
            )
            found = [new if absent else one for new, absent, one in zip(anew, missing, found, strict=True)]
        of = (ctx.saved_tensors[0], ctx.saved_tensors[1], ctx.saved_tensors[5])
        a, b, t = (None if one is None else one.to(like.dtype) for one, like in zip(found, of, strict=True))
        return a, b, None, None, None, t, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(WaitingInfoNCE, info, in_dims, arguments)


class InfoNCEGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        grad: Tensor,
        queries: Tensor,
        keys: Tensor,
        target: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        temperature: Tensor,
        query_lse: Tensor,
        key_lse: Tensor,
        normalize: bool,
        symmetric: bool,
        for_queries: bool,
        for_keys: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (grad, queries, keys, target, query_labels, key_labels, temperature, query_lse, key_lse)
        return raw(backend, "info_nce_backward", *tensors, normalize, symmetric, for_queries, for_keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        raise no_second("info_nce")

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(InfoNCEGradient, info, in_dims, arguments)


def _fake_info_nce(queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    def per_row(count: Any) -> Tensor:
        return queries.new_empty(count, dtype=score_dtype(queries))

    symmetric = rest[-1]
    return per_row(queries.shape[0]), per_row(queries.shape[0]), per_row(keys.shape[0] if symmetric else 0)


def _fake_gradient(grad: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    made = [gradient_like(queries, rest[-2]), gradient_like(keys, rest[-1])]
    parts = [queries.new_empty(0) if gradient is None else gradient for gradient in made]
    return *parts, queries.new_empty((), dtype=score_dtype(queries))


def _fake_foreseen(queries: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    loss, lse, _ = _fake_info_nce(queries, keys, False)
    *gradients, temperature = _fake_gradient(loss, queries, keys, *rest)
    return loss, lse, *(gradient.to(loss.dtype) for gradient in gradients), temperature


register_fake("info_nce", _fake_info_nce)
register_fake("info_nce_foreseen", _fake_foreseen)
register_fake("info_nce_backward", _fake_gradient)
