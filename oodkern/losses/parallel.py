"""A head whose classes are spread over processes: each forms the scores of its own, and numbers [N] are merged.

For weights [K, D] that are too large for one process, as DTensors with placement Shard(0) on a mesh of one dimension.
Features and targets are the same on every process, as is the gradient that arrives at the loss. With r the processes
and E_r the energy of the logits of r's classes,

    E = e - T log sum_r exp((e - E_r) / T),   e = min_r E_r        dE / dE_r = exp((E - E_r) / T)

and what is a sum over the classes is the sum of the processes' sums. The backward pass communicates nothing:

    weight, bias: each process gets the whole gradient of its own classes
    features: each process gets the part of its own classes, and the sum over the processes is the gradient

The numbers are gathered in the order of the ranks and merged by each process alike, so that the loss, and what is
chosen by a score (EDGE's tail), are the same on all of them to the last bit. Each merge is one collective of N numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from oodkern.losses._checks import own_classes
from oodkern.losses.logits import FusedLogits, Head, Logits, fused_logits
from oodkern.ops._checks import score_dtype
from oodkern.ops._product import autocast


def gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values [N] of every process, [P, N]."""
    found = values.new_empty(group.size(), *values.shape)
    if values.numel():
        dist.all_gather(list(found), values.contiguous(), group=group)
    return found


class Once(torch.autograd.Function):
    """The gradient in this process's scores S_r, which is that of the merged scores times a slope, and no more.

    The slope depends on the scores of all processes; as a constant it would make second derivatives wrong in silence.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, own: Tensor, slope: Tensor | None) -> Tensor:
        return gradient.view_as(gradient) if slope is None else gradient * slope

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        raise RuntimeError(
            "head_weight: a loss of a head that is a DTensor can be differentiated once, and a second derivative was "
            "asked for"
        )


class Sum(torch.autograd.Function):
    """sum_r S_r of the processes' S_r [N]."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own)
        return gathered(own, group).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return Once.apply(gradient, *ctx.saved_tensors, None), None


class MergedEnergy(torch.autograd.Function):
    """The energy [N] of all logits, of the energies E_r [N] of each process's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, temperature: float, group: dist.ProcessGroup) -> Tensor:
        every = gathered(own, group)
        least = every.amin(0)
        # Infinite where there are no logits, or one is: subtracted from itself it would be NaN.
        least = torch.where(least.isinf(), 0.0, least)
        total = ((least - every) / temperature).exp().sum(0)
        # Not of the merged energy, whose rounding would be in the slope; that of E_r cancels with the softmax's.
        ctx.save_for_backward(own, ((least - own) / temperature).exp() / total)
        return least - temperature * total.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return Once.apply(gradient, *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class Share:
    """The classes that this process of the group has, of `total`."""

    classes: slice
    total: int
    group: dist.ProcessGroup

    def rows(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The row in the shard of each target [N], and whether it is there; row 0 where it is not.

        A target that is no process's stays out of range, for the check of what takes the row.
        """
        target = target.long()
        mine = (target >= self.classes.start) & ((target < self.classes.stop) | (target >= self.total))
        return torch.where(mine, target - self.classes.start, 0), mine


class ParallelLogits(Logits):
    """Of features and a sharded head, by the logits of this process's classes, `own`.

    `mine` [N] marks the rows whose class is here; None: there are no targets, or each row has many.
    """

    def __init__(self, own: FusedLogits, share: Share, mine: Tensor | None = None) -> None:
        super().__init__()
        self.own, self.share, self.mine, self.classes = own, share, mine, share.total

    def sum(self, number: Callable[[], Tensor]) -> Tensor:
        """The sum over the processes of a number of each row, 0 of one without classes."""
        features = self.own.features
        own = number() if self.own.classes else features.new_zeros(len(features), dtype=score_dtype(features))
        return Sum.apply(own, self.share.group)

    def form(self, score: str, temperature: float) -> Tensor:
        own = self.own.score(score, temperature)
        if score == "energy":
            return MergedEnergy.apply(own, temperature, self.share.group)
        return Sum.apply(own, self.share.group)

    def chosen(self) -> Tensor:
        mine = self.mine
        return self.sum(lambda: self.own.chosen() if mine is None else torch.where(mine, self.own.chosen(), 0.0))

    def mean(self) -> Tensor:
        return self.sum(lambda: self.own.mean() * (self.own.classes / self.classes))

    def alignment(self) -> Tensor:
        return self.sum(lambda: self.own.alignment() * (self.own.classes / self.classes))

    def own_cosine(self, target: Tensor) -> Tensor:
        rows, mine = self.share.rows(target)
        return self.sum(lambda: torch.where(mine, self.own.own_cosine(rows), 0.0))


def parallel_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, n_id: int | None
) -> tuple[Logits, Logits]:
    """As `fused_logits`, of a weight and a bias that are DTensors."""
    assert isinstance(weight, DTensor)
    assert bias is None or isinstance(bias, DTensor)
    share = Share(own_classes(weight), len(weight), weight.device_mesh.get_group())
    features, *own = autocast(features, weight.to_local(), None if bias is None else bias.to_local())
    rows, mine = (target[:, share.classes], None) if target.dim() == 2 else share.rows(target)
    known, unknown = fused_logits(features, Head(*own), rows, n_id, {})
    merged = ParallelLogits(known, share, mine)
    return merged, merged if n_id is None else ParallelLogits(unknown, share)
