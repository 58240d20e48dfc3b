"""Room `heads`: losses of given logits, value and gradient, for a random upstream of each row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_logits

MARGIN = -7.0  # of outliers, as published
LABEL_SHARE = 0.05
CHUNK_ELEMENTS = {
    "cpu": 1 << 18,
    "cuda": 1 << 26,
}  # 1 MiB of float32 stays in a core's cache; a GPU wants large kernels


def eager_oe(logits):
    return torch.logsumexp(logits, -1) - logits.mean(-1)


def eager_energy(logits):
    return (MARGIN + torch.logsumexp(logits, -1)).relu().square()


def eager_bce(logits, target):
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)


def oe_by_hand(logits, upstream):
    logits = logits.float()
    value = torch.logsumexp(logits, -1) - logits.mean(-1)
    return value, logits.softmax(-1).sub_(1 / logits.shape[-1]).mul_(upstream[:, None])


def energy_by_hand(logits, upstream):
    logits = logits.float()
    over = (MARGIN + torch.logsumexp(logits, -1)).relu()
    return over.square(), logits.softmax(-1).mul_((2 * upstream * over)[:, None])


def bce_by_hand(logits, target, upstream):
    logits, target = logits.float(), target.float()
    value = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    return value, logits.sigmoid().sub_(target).mul_(upstream[:, None] / logits.shape[-1])


def chunk_rows(tensor):
    return max(1, CHUNK_ELEMENTS[tensor.device.type] // tensor.shape[1])


def chunked(by_hand, *inputs, upstream):
    """The gradient by the first input, some rows at a time; their values are formed as well."""
    values, gradient = torch.empty_like(upstream), torch.empty_like(inputs[0])
    rows = chunk_rows(gradient)
    for start in range(0, len(gradient), rows):
        part = slice(start, start + rows)
        values[part], gradient[part] = by_hand(*(one[part] for one in inputs), upstream[part])
    return gradient


def pytorch_ood_oe(logits):
    """All rows are outliers; what is left of its cross-entropy is 0. It fails for logits of 16 bits."""
    from pytorch_ood.loss import OutlierExposureLoss

    outliers = torch.full((len(logits),), -1, device=logits.device)
    return OutlierExposureLoss(alpha=1.0, reduction="none")(logits.float(), outliers)


def pytorch_ood_energy(logits):
    from pytorch_ood.loss import EnergyRegularizedLoss

    outliers = torch.full((len(logits),), -1, device=logits.device)
    return EnergyRegularizedLoss(alpha=1.0, margin_out=MARGIN, reduction="none")(logits, outliers)


def logits_and_labels(shape, dtype, generator):
    """Labels in the dtype of the logits, as PyTorch wants them; one in twenty is 1."""
    labels = torch.rand(shape, generator=generator) < LABEL_SHARE
    return *random_logits(shape, dtype, generator), labels.to(getattr(torch, dtype))


# Ours, eager, by hand, the oracle, pytorch-ood's.
HEADS: dict[str, tuple[Callable[..., Any], ...]] = {
    "oe_head": (oodkern.oe_head, eager_oe, oe_by_hand, reference.oe_head, pytorch_ood_oe),
    "energy_head": (
        functools.partial(oodkern.energy_head, margin=MARGIN, side="out"),
        eager_energy,
        energy_by_hand,
        functools.partial(reference.energy_head, margin=MARGIN, side="out"),
        pytorch_ood_energy,
    ),
    "bce_head": (oodkern.bce_head, eager_bce, bce_by_hand, reference.bce_head),
}


@case
def head(*, op: str = "oe_head", N: int, K: int, dtype: str, target: float | None = None) -> Case:
    ours, eager, by_hand, oracle, *third = HEADS[op]
    labels = op == "bce_head"
    contenders = {
        OURS: Contender(ours),
        "oodkern, foreseen": Contender(ours, told=True),
        "eager": Contender(eager),
        COMPILED: Contender(eager, compiled=True),
        "chunked": Contender(functools.partial(chunked, by_hand), by_hand=True),
    }
    for function in third:
        contenders["pytorch-ood"] = Contender(function, needs=("pytorch_ood.loss",))
    return Case(
        room="heads",
        title=f"{op}, backward",
        sizes={"N": N, "K": K},
        dtype=dtype,
        passes="backward",
        inputs=functools.partial(logits_and_labels if labels else random_logits, (N, K), dtype),
        contenders=contenders,
        oracle=oracle,
        upstream=N,
        rows=(0, 1) if labels else (0,),
        bytes=bytes_of((N, K), dtype) * (3 if labels else 2) + 4 * N,
        target=target,
    )
