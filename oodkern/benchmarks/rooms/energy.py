"""Room `energy`: one score a row of given logits."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_logits

CHUNK_ROWS = 4_096
SCORES = ("energy", "joint_energy")


def published_energy(logits):
    """As the released code has it: the temperature is there, and 1."""
    return -(1.0 * torch.logsumexp(logits / 1.0, dim=1))


def eager_energy(logits):
    return -torch.logsumexp(logits, -1)


def published_joint_energy(logits):
    """As the released code has it; exp overflows from logits of 89 on."""
    return torch.log(1 + torch.exp(logits)).sum(1)


def eager_joint_energy(logits):
    return F.softplus(logits).sum(-1)


EAGER = {"energy": eager_energy, "joint_energy": eager_joint_energy}
PUBLISHED = {"energy": published_energy, "joint_energy": published_joint_energy}


def chunked(function, logits):
    """Some rows at a time, so that temporaries stay small."""
    return torch.cat([function(rows) for rows in logits.split(CHUNK_ROWS)])


@case
def score(*, op: str = "energy", N: int, K: int, dtype: str, passes: str, target: float | None = None) -> Case:
    eager = EAGER[op]
    return Case(
        room="energy",
        title=f"{op}, {passes}",
        sizes={"N": N, "K": K},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(random_logits, (N, K), dtype),
        contenders={
            OURS: Contender(getattr(oodkern, op)),
            "published": Contender(PUBLISHED[op]),
            "eager": Contender(eager),
            COMPILED: Contender(eager, compiled=True),
            "chunked": Contender(functools.partial(chunked, eager)),
        },
        oracle=getattr(reference, op),
        upstream=N,
        rows=(0,),
        bytes=bytes_of((N, K), dtype) * (1 if passes == "forward" else 3) + 4 * N,
        target=target,
    )
