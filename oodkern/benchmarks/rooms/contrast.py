"""Room `contrast`: InfoNCE of two sets of features."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal
from oodkern.benchmarks.rooms.linear_energy import add_product, chunk_rows

TEMPERATURE = 0.1


def pairs(N: int, D: int, dtype: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and the key of each query, which is another one's for none."""
    queries, keys = (random_normal(generator, (N, D), dtype) for _ in range(2))
    return queries, keys, torch.randperm(N, generator=generator)


def ours(symmetric, q, k, target):
    return oodkern.info_nce(q, k, target, TEMPERATURE, symmetric=symmetric)


def eager(symmetric, q, k, target):
    """As CLIP and its like write it: normalise, one product, a cross-entropy a direction."""
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T).float() / TEMPERATURE
    rows = F.cross_entropy(scores, target, reduction="none")
    if not symmetric:
        return rows
    return (rows + F.cross_entropy(scores.T, target.argsort(), reduction="none")[target]) / 2


def chunked_by_hand(symmetric, q, k, target, *, upstream):
    """Some rows of scores at a time, their slopes while they are there; symmetric, columns' logsumexp before."""
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    units = [F.normalize(t, dim=-1) for t in leaves]
    u, v = (t.detach() for t in units)
    du, dv, value = torch.empty_like(u), torch.zeros_like(v, dtype=torch.float32), torch.empty_like(upstream)
    split = [t.split(chunk_rows(q, len(k))) for t in (u, du, target, upstream, value)]
    columns = None
    if symmetric:
        columns = upstream.new_full((len(k),), -torch.inf)
        for part in split[0]:
            columns = columns.logaddexp((part @ v.T).float().div_(TEMPERATURE).logsumexp(0))
        of_column = upstream[target.argsort()] / 2
    for part, dpart, positive, g, out in zip(*split, strict=True):
        s = (part @ v.T).float().div_(TEMPERATURE)
        rows = s.logsumexp(-1)
        at = positive[:, None]
        torch.sub(rows, s.gather(1, at).squeeze(1), out=out)
        if columns is None:
            slope = s.sub_(rows[:, None]).exp_().mul_(g[:, None])
        else:
            out.add_((columns[positive] - rows) / 2)
            slope = (s - rows[:, None]).exp_().mul_(g[:, None] / 2)
            slope.addcmul_(s.sub_(columns).exp_(), of_column)
        slope.scatter_add_(1, at, -g[:, None])
        slope = slope.div_(TEMPERATURE).to(q.dtype)
        torch.mm(slope, v, out=dpart)
        add_product(dv, slope.T, part)
    return torch.autograd.grad(units, leaves, [du, dv.to(v.dtype)])


@case
def info_nce(
    *,
    N: int,
    D: int,
    dtype: str,
    symmetric: bool = False,
    target: float | None = None,
    memory_share: float | None = None,
) -> Case:
    size = bytes_of((N, D), dtype)
    made = {
        name: functools.partial(function, symmetric)
        for name, function in ((OURS, ours), ("eager", eager), ("chunked", chunked_by_hand))
    }
    return Case(
        room="contrast",
        title=f"info_nce{', symmetric' if symmetric else ''}, backward",
        sizes={"N": N, "D": D},
        dtype=dtype,
        passes="backward",
        inputs=functools.partial(pairs, N, D, dtype),
        contenders={
            OURS: Contender(made[OURS]),
            "eager": Contender(made["eager"]),
            COMPILED: Contender(made["eager"], compiled=True),
            "chunked": Contender(made["chunked"], by_hand=True),
        },
        oracle=functools.partial(exact, symmetric),
        leaves=(0, 1),
        upstream=N,
        upstreams="mean",
        rows=() if symmetric else (0, 2),
        flops=6.0 * N * N * D,
        bytes=4 * size + 8 * N,
        slack=1e-5,
        target=target,
        memory_share=memory_share,
    )


def exact(symmetric, q, k, target):
    return reference.info_nce(q, k, target, TEMPERATURE, symmetric=symmetric)
