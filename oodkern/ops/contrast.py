"""Room `contrast`: mutual-information contrast of two sets of features. Derivatives: `oodkern.ops._info_nce`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._autograd import apply
from oodkern.ops._checks import INTEGERS, LARGEST_TEMPERATURE, check_temperature, check_tensor, score_dtype
from oodkern.ops._info_nce import InfoNCE, WaitingInfoNCE, can_wait
from oodkern.ops._product import autocast, check_beside, check_matrix


def info_nce(
    queries: Tensor,
    keys: Tensor,
    target: Tensor | None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    symmetric: bool = False,
    positives: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """InfoNCE loss of each query, log sum_j exp(s_ij) - s_i,target, with s_ij = q_i . k_j / temperature, [N].

    Args:
        queries: [N, D], float64, float32, bfloat16 or float16.
        keys: [M, D], in the dtype of the queries (under autocast both are cast to its dtype).
        target: [N] integers in 0..M-1, the index of each query's positive key; None with `positives`.
        temperature: T > 0, a number or a tensor of one element, which may require a gradient.
        normalize: take q and k at norm 1 (a row of zeros stays one; in float32 norms between 1e-15 and 1e15).
        symmetric: the mean of the queries' and the keys' direction; N = M. The keys' is
            log sum_i exp(s_ij) - s_i,target at j = target[i].
        positives: labels (of the queries [N], of the keys [M]), integers: all keys of a query's label are its
            positives, and the mean of their s_ij takes the place of s_i,target. A query without any has loss 0. The
            keys' direction, at j = i, likewise.

    Returns:
        [N] in nats; float32 (float64 for float64 queries), also under autocast. log(M) minus its mean bounds the
        mutual information of positive pairs from below.

    Differentiable once, in queries, keys and a tensor temperature. Neither scores nor masks [N, M] are stored. On the
    CPU, without `symmetric`, gradients are formed with the losses where a row of scores fits into what is held (of
    16-bit features from 128 keys on), and wait in the dtype of the losses for an upstream that is one number for all
    rows, as a mean's is: three products instead of four, of which `torch.no_grad` saves two where no backward pass is
    to come. Where it differs between rows, gradients other than the queries' are formed anew, five products in all.
    Raises TypeError or ValueError for an argument of the wrong kind or shape.

    Source: van den Oord, Li, Vinyals, Representation Learning with Contrastive Predictive Coding, 2018; several
    positives: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (their L_out).
    """
    check_matrix(queries, "queries")
    mixed = reference.autocasting(queries)
    check_matrix(keys, "keys", "M, D")
    if keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys: expected [M, {queries.shape[1]}] as queries are, got {list(keys.shape)}")
    check_beside(keys, "keys", queries, "queries", dtype=not mixed)
    N, M = len(queries), len(keys)
    if symmetric and N != M:
        raise ValueError(f"keys: expected {N} rows as queries have, since symmetric, got {M}")
    if positives is not None:
        if target is not None:
            raise ValueError("target: expected None beside positives, which say which keys are positive")
        if not isinstance(positives, tuple | list) or len(positives) != 2:
            raise TypeError("positives: expected labels of the queries and labels of the keys, a pair of tensors")
        positives = (
            _indices(positives[0], "positives[0]", N, queries),
            _indices(positives[1], "positives[1]", M, queries),
        )
    else:
        target = _indices(target, "target", N, queries)
        # Reading values would make a GPU wait and torch.compile break its graph.
        if N and target.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_batched(target):
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= M:
                raise ValueError(f"target: expected keys in 0..{M - 1}, got {low if low < 0 else high}")
    temperature = _temperature(temperature, queries)
    queries, keys = autocast(queries, keys)
    backend = backend_for("contrast", queries, M)
    if backend == "reference":
        return reference.info_nce(queries, keys, target, temperature, normalize, symmetric, positives)
    labels = (None, None) if positives is None else positives
    tensors = (queries, keys, target, labels[0], labels[1], temperature)
    if not symmetric and can_wait(backend, queries, keys, temperature):
        return apply(WaitingInfoNCE, *tensors, bool(normalize), queries.requires_grad, keys.requires_grad)[0]
    return apply(InfoNCE, backend, *tensors, bool(normalize), bool(symmetric))[0]


def _is_batched(tensor: Tensor) -> bool:
    """Inside torch.vmap, where values cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _indices(value: Any, name: str, count: int, beside: Tensor) -> Tensor:
    check_tensor(value, name)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected integers, got {str(value.dtype).removeprefix('torch.')}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name}: expected [{count}], one number a row, got {list(value.shape)}")
    check_beside(value, name, beside, "queries", dtype=False)
    return value.long()


def _temperature(value: Any, queries: Tensor) -> Tensor:
    """As a tensor without dimensions, in the dtype of scores."""
    if not isinstance(value, Tensor):
        return torch.full((), check_temperature(value), dtype=score_dtype(queries), device=queries.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"temperature: expected a number or a floating tensor of one element, got {list(value.shape)}"
            f" {str(value.dtype).removeprefix('torch.')}"
        )
    check_beside(value, "temperature", queries, "queries", dtype=False)
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_batched(value):
        number = float(value.detach())
        if not 1 / LARGEST_TEMPERATURE <= number <= LARGEST_TEMPERATURE:
            raise ValueError(f"temperature: expected a positive number (between 2^-100 and 2^100), got {number}")
    return value.reshape(()).to(score_dtype(queries))
