"""Sums of chosen rows of a matrix [K, D], whose gradient joins the matrix's own instead of being one more matrix.

A selection A [N, K] says which: None is the mean of all rows (N = 1), integers [N] one row each, numbers [N, K] are A
itself. With M the matrix, Select and Spread are each other's derivative:

    Select(M) = (M, A M)        Spread(G, H) = G + A^T H

What else is made of M is made of Select's first result. Its gradient G then arrives together with H, and takes
A^T H in place: autograd on M[target] alone would fill one more [K, D] with zeros, and add it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from oodkern import _native
from oodkern.ops._autograd import readable
from oodkern.ops._checks import score_dtype
from oodkern.ops._product import one_by_one, register_fake

# Numbers of a temporary: 4 MiB in float32.
CHUNK = 1 << 20


def chunks(K: int, width: int) -> Iterator[slice]:
    """Classes so many at a time that they times `width` are at most CHUNK; all at once for a compiler to fuse."""
    step = max(K if torch.compiler.is_compiling() else CHUNK // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, K, step))


def select(matrix: Tensor, selection: Tensor | None) -> Tensor:
    """A M in float32 at least: [N, D], or [1, D] of the mean."""
    dtype = score_dtype(matrix)
    if selection is not None and selection.dim() == 1:
        return matrix.index_select(0, selection).to(dtype)
    K, D = matrix.shape
    total = matrix.new_zeros(1 if selection is None else len(selection), D, dtype=dtype)
    for classes in chunks(K, max(D, len(total))):
        rows = matrix[classes].to(dtype)
        total += rows.sum(0) if selection is None else product(selection[:, classes].to(dtype), rows)
    return total / K if selection is None else total


def spread_(gradient: Tensor, rows: Tensor, selection: Tensor | None) -> Tensor:
    """G + A^T H into G, formed in the dtype of H and rounded to that of G once."""
    if selection is not None and selection.dim() == 1:
        # Rows of one class are summed first, so that 16-bit gradients are rounded once, not once for each.
        native = gradient.device.type == "cpu" and not _native.missing["cpu"] and not torch.compiler.is_compiling()
        if native and readable(gradient, rows, selection):
            torch.ops.oodkern.add_rows_(gradient, rows, selection)
            return gradient
        # Summed at the first of them; all then write the same numbers. index_put_ adds in a fixed order, also on a GPU.
        N, K = len(selection), len(gradient)
        order = torch.arange(N, device=selection.device)
        first = selection.new_full((K,), N).scatter_reduce(0, selection, order, "amin")[selection]
        total = torch.zeros_like(rows).index_put_((first,), rows, accumulate=True)[first]
        return gradient.index_put_((selection,), (gradient[selection].to(rows.dtype) + total).to(gradient.dtype))
    K, D = gradient.shape
    for classes in chunks(K, max(D, len(rows))):
        own = gradient[classes].to(rows.dtype)
        more = rows / K if selection is None else product(selection[:, classes].to(rows.dtype).T, rows)
        gradient[classes] = own + more
    return gradient


def product(one: Tensor, other: Tensor) -> Tensor:
    """A matrix product that autocast does not round to 16 bits."""
    with torch.autocast(one.device.type, enabled=False):
        return one @ other


class Select(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, selection: Tensor | None) -> tuple[Tensor, Tensor]:
        return matrix.view_as(matrix), select(matrix, selection)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, rows: Tensor) -> tuple:
        (selection,) = ctx.saved_tensors
        # Ours alone where nothing is recorded and nothing is expanded: what it is the gradient of is known to no one.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not gradient.is_contiguous():
            return Spread.apply(gradient, rows, selection), None
        return spread_(gradient, rows, selection), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(Select, info, in_dims, arguments)


class Spread(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, rows: Tensor, selection: Tensor | None) -> Tensor:
        return spread_(gradient.clone(memory_format=torch.contiguous_format), rows, selection)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:
        return *Select.apply(cotangent, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple:
        return one_by_one(Spread, info, in_dims, arguments)


register_fake("add_rows_", lambda matrix, rows, index: None)
