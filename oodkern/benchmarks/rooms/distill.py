"""Room `distill`: the divergence of each row of a student's logits from a teacher's."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms import heads
from oodkern.benchmarks.rooms.common import bytes_of, random_logits


def eager_distillation(student, teacher):
    """As published, too."""
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)


def by_hand(student, teacher, upstream):
    log_q, p = student.float().log_softmax(-1), teacher.float().softmax(-1)
    value = F.kl_div(log_q, p, reduction="none").sum(-1)
    return value, log_q.exp_().sub_(p).mul_(upstream[:, None])


def chunked_forward(student, teacher):
    size = heads.chunk_rows(student)
    pairs = zip(student.split(size), teacher.split(size), strict=True)
    return torch.cat([eager_distillation(*rows) for rows in pairs])


def liger(student, teacher):
    """It takes the student's log-probabilities and the teacher's probabilities, and gives one number an element."""
    from liger_kernel.transformers import LigerKLDIVLoss

    return LigerKLDIVLoss(reduction="none")(student.log_softmax(-1), teacher.softmax(-1)).sum(-1)


def student_and_teacher(shape, dtype, generator):
    return *random_logits(shape, dtype, generator), *random_logits(shape, dtype, generator)


@case
def distillation(*, N: int, K: int, dtype: str, passes: str, target: float | None = None) -> Case:
    forward = passes == "forward"
    return Case(
        room="distill",
        title=f"distillation, {passes}",
        sizes={"N": N, "K": K},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(student_and_teacher, (N, K), dtype),
        contenders={
            OURS: Contender(oodkern.distillation),
            "eager": Contender(eager_distillation),
            COMPILED: Contender(eager_distillation, compiled=True),
            "chunked": Contender(chunked_forward)
            if forward
            else Contender(functools.partial(heads.chunked, by_hand), by_hand=True),
            "Liger": Contender(liger, needs=("liger_kernel", "cuda")),
        },
        oracle=reference.distillation,
        upstream=N,
        rows=(0, 1),
        bytes=bytes_of((N, K), dtype) * (2 if forward else 3) + 4 * N,
        target=target,
    )
