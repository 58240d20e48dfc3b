"""Room `linear_energy`: scores of the logits of features and a head, which need not be formed."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal
from oodkern.benchmarks.rooms.energy import published_joint_energy

# Of float32 logits, or of features where these are wider. On a CPU 1, 4 and 16 MiB take the same time within 6 %.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
FEWEST_ROWS = 256  # for fewer the sums of the weight's gradient are read and written too often
SCORES = ("energy", "joint_energy")
ORACLE_ROWS = 4_096


def head_inputs(N: int, D: int, K: int, dtype: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight and bias whose logits have deviation 2."""
    features = random_normal(generator, (N, D), dtype)
    return features, random_normal(generator, (K, D), dtype, 2 * D**-0.5), random_normal(generator, (K,), dtype)


def chunk_rows(features, classes):
    """How many rows a good engineer takes at a time."""
    return max(FEWEST_ROWS, CHUNK_BYTES[features.device.type] // (4 * max(classes, features.shape[1])))


def add_product(total, a, b):
    """total += a @ b, which is rounded to the dtype of a and b before."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def eager_energy(x, w, b):
    """The published code's as well, which divides by a temperature of 1."""
    return -torch.logsumexp(F.linear(x, w, b).float(), -1)


def eager_joint_energy(x, w, b):
    return F.softplus(F.linear(x, w, b).float()).sum(-1)


def published_linear_joint_energy(x, w, b):
    return published_joint_energy(F.linear(x, w, b))


EAGER = {"energy": eager_energy, "joint_energy": eager_joint_energy}


def chunked(op, x, w, b):
    return torch.cat([EAGER[op](rows, w, b) for rows in x.split(chunk_rows(x, len(w)))])


def chunked_by_hand(op, x, w, b, *, upstream):
    """The gradients of each chunk while its logits are there: three products."""
    dx, value = torch.empty_like(x), torch.empty_like(upstream)
    dw, db = torch.zeros_like(w, dtype=torch.float32), torch.zeros_like(b, dtype=torch.float32)
    count = chunk_rows(x, len(w))
    for part, rows, g, out in zip(*(t.split(count) for t in (x, dx, upstream, value)), strict=True):
        z = F.linear(part, w, b).float()
        if op == "energy":
            out.copy_(z.logsumexp(-1).neg_())
            slope = z.add_(out[:, None]).exp_().mul_(-g[:, None])
        else:
            out.copy_(F.softplus(z).sum(-1))
            slope = z.sigmoid_().mul_(g[:, None])
        db += slope.sum(0)
        slope = slope.to(x.dtype)
        torch.mm(slope, w, out=rows)
        add_product(dw, slope.T, part)
    return dx, dw.to(w.dtype), db.to(b.dtype)


def foreseen(op, x, w, b, *, upstream):
    """As a loss of rows tells the score what its upstream will be."""
    return getattr(oodkern, f"linear_{op}")(x, w, b, upstream=oodkern.Upstream(upstream))


@case
def linear_score(
    *,
    op: str = "energy",
    N: int,
    D: int,
    K: int,
    dtype: str,
    passes: str,
    target: float | None = None,
    memory_share: float | None = None,
) -> Case:
    forward = passes == "forward"
    contenders = {OURS: Contender(getattr(oodkern, f"linear_{op}"))}
    if not forward:
        contenders["oodkern, foreseen"] = Contender(functools.partial(foreseen, op), told=True)
    if op == "joint_energy":
        contenders["published"] = Contender(published_linear_joint_energy)
    contenders |= {"eager": Contender(EAGER[op]), COMPILED: Contender(EAGER[op], compiled=True)}
    contenders["chunked"] = Contender(
        functools.partial(chunked if forward else chunked_by_hand, op), by_hand=not forward
    )
    moved = sum(bytes_of(shape, dtype) for shape in ((N, D), (K, D), (K,)))
    return Case(
        room="linear_energy",
        title=f"linear_{op}, {passes}",
        sizes={"N": N, "D": D, "K": K},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(head_inputs, N, D, K, dtype),
        contenders=contenders,
        oracle=getattr(reference, f"linear_{op}"),
        leaves=(0, 1, 2),
        upstream=N,
        rows=(0,),
        flops=2.0 * N * D * K * (1 if forward else 3),
        bytes=moved + 4 * N if forward else 2 * moved + 8 * N,
        # A float32 energy of 10 is rounded by 1e-6 of a softmax, which the gradients are made of.
        slack=1e-6 if forward else 3e-6,
        target=target,
        memory_share=memory_share,
    )


def eager_scores(x, w, b):
    z = F.linear(x, w, b).float()
    energy = -torch.logsumexp(z, -1)
    max_logit, argmax = z.max(-1)
    return energy, F.softplus(z).sum(-1), max_logit, argmax, (max_logit + energy).exp()


def chunked_scores(x, w, b):
    parts = [eager_scores(rows, w, b) for rows in x.split(chunk_rows(x, len(w)))]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def scores_error(result, inputs):
    """The largest of the five; that of an argmax is how far the logit it names is from the largest one."""
    x, w, b = (t.double() for t in (inputs[0][:ORACLE_ROWS], *inputs[1:]))
    found = [score[: len(x)] for score in result]
    exact = reference.linear_scores(x, w, b)
    named = F.linear(x, w, b).gather(1, found[3][:, None]).squeeze(1)
    pairs = [(found[i].double(), exact[i]) for i in (0, 1, 2, 4)] + [(named, exact[2])]
    return max(float((ours - of).abs().max() / of.abs().max()) for ours, of in pairs)


@case
def linear_scores(*, N: int, D: int, K: int, dtype: str) -> Case:
    return Case(
        room="linear_energy",
        title="linear_scores, forward",
        sizes={"N": N, "D": D, "K": K},
        dtype=dtype,
        passes="forward",
        inputs=functools.partial(head_inputs, N, D, K, dtype),
        contenders={
            OURS: Contender(oodkern.linear_scores),
            "eager": Contender(eager_scores),
            COMPILED: Contender(eager_scores, compiled=True),
            "chunked": Contender(chunked_scores),
        },
        error=scores_error,
        flops=2.0 * N * D * K,
        bytes=sum(bytes_of(shape, dtype) for shape in ((N, D), (K, D), (K,))) + (4 * 4 + 8) * N,
    )
