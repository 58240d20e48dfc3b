"""Room `subspace`: how features lie to class weights and to the space that these span."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal
from oodkern.benchmarks.rooms.linear_energy import chunk_rows

OUTSIDE = 0.5  # weight of the complement: both parts have gradients


def published_alignment(x, w):
    """As the released code has it: norms without a guard, the L1 norm of the cosines, a factor afterwards."""
    x, w = x / x.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    return torch.norm(x @ w.T, p=1, dim=1) / len(w)


def eager_alignment(x, w):
    return (F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).T).float().abs().mean(-1)


def chunked_alignment(x, w):
    w = F.normalize(w, dim=-1)
    parts = [(F.normalize(rows, dim=-1) @ w.T).float().abs_().mean(-1) for rows in x.split(chunk_rows(x, len(w)))]
    return torch.cat(parts)


def chunked_alignment_by_hand(x, w, *, upstream):
    w, dx, value = F.normalize(w, dim=-1), torch.empty_like(x), torch.empty_like(upstream)
    for part, rows, g, out in zip(*(t.split(chunk_rows(x, len(w))) for t in (x, dx, upstream, value)), strict=True):
        norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32)
        unit = part / norm
        cosines = (unit.to(x.dtype) @ w.T).float()
        toward = (torch.sign(cosines).to(x.dtype) @ w).float()
        out.copy_(cosines.abs_().mean(-1))
        rows.copy_((toward / len(w) - out[:, None] * unit) * (g[:, None] / norm))
    return (dx,)


def head(N: int, D: int, K: int, dtype: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features after a ReLU, and weights that lean to them or from them: the sign of a cosine near zero, which the
    gradient depends on, is float32's to decide, and would be what errors consist of."""
    lean = torch.randint(0, 2, (K, 1), generator=generator) - 0.5
    weight = torch.randn(K, D, generator=generator) + lean
    return random_normal(generator, (N, D), dtype).abs_(), weight.to(getattr(torch, dtype))


@case
def alignment(*, N: int, D: int, K: int, dtype: str, passes: str) -> Case:
    """Gradients of the features alone: Separation detaches the weight."""
    forward = passes == "forward"
    moved = bytes_of((N, D), dtype), bytes_of((K, D), dtype)
    return Case(
        room="subspace",
        title=f"alignment, {passes}",
        sizes={"N": N, "D": D, "K": K},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(head, N, D, K, dtype),
        contenders={
            OURS: Contender(oodkern.alignment),
            "published": Contender(published_alignment),
            "eager": Contender(eager_alignment),
            COMPILED: Contender(eager_alignment, compiled=True),
            "chunked": Contender(chunked_alignment) if forward else Contender(chunked_alignment_by_hand, by_hand=True),
        },
        oracle=reference.alignment,
        upstream=N,
        rows=(0,),
        flops=2.0 * N * D * K * (1 if forward else 2),
        bytes=sum(moved) + 4 * N + (0 if forward else moved[0] + 4 * N),
    )


def features_and_basis(N: int, D: int, r: int, dtype: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The basis is float32, as `orthonormal_basis` gives it."""
    return random_normal(generator, (N, D), dtype), oodkern.orthonormal_basis(torch.randn(r, D, generator=generator))


def summed(op, x, u):
    inside, outside = op(x, u)
    return inside + OUTSIDE * outside


def eager_subspace(x, u):
    """The complement by its residual, as it has to be."""
    inside = x.float() @ u
    outside = x.float() - inside @ u.T
    return inside.square().sum(-1) + OUTSIDE * outside.square().sum(-1)


def chunked_subspace(x, u):
    return torch.cat([eager_subspace(rows, u) for rows in x.split(chunk_rows(x, len(u)))])


def chunked_subspace_by_hand(x, u, *, upstream):
    """By an engineer who knows that the basis is orthonormal: two products instead of four."""
    dx, value = torch.empty_like(x), torch.empty_like(upstream)
    for part, rows, g, out in zip(*(t.split(chunk_rows(x, len(u))) for t in (x, dx, upstream, value)), strict=True):
        part = part.float()
        inside = part @ u
        projection = inside @ u.T
        outside = part - projection
        out.copy_(inside.square().sum(-1) + OUTSIDE * outside.square().sum(-1))
        rows.copy_(projection.add_(outside, alpha=OUTSIDE).mul_(2 * g[:, None]))
    return (dx,)


@case
def subspace_energy(*, N: int, D: int, r: int, dtype: str, passes: str) -> Case:
    """Gradients of the features alone: a basis is a constant."""
    forward = passes == "forward"
    size, basis = bytes_of((N, D), dtype), bytes_of((D, r), "float32")
    return Case(
        room="subspace",
        title=f"subspace_energy, {passes}",
        sizes={"N": N, "D": D, "r": r},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(features_and_basis, N, D, r, dtype),
        contenders={
            OURS: Contender(functools.partial(summed, oodkern.subspace_energy)),
            "eager": Contender(eager_subspace),
            COMPILED: Contender(eager_subspace, compiled=True),
            "chunked": Contender(chunked_subspace) if forward else Contender(chunked_subspace_by_hand, by_hand=True),
        },
        oracle=functools.partial(summed, reference.subspace_energy),
        upstream=N,
        rows=(0,),
        # Of an orthonormal basis; ours takes any, which is twice that in the backward pass.
        flops=4.0 * N * D * r,
        bytes=size + basis + 4 * N + (0 if forward else size + 4 * N),
    )
