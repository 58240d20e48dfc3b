"""The gradients of a step, of one forward pass over its batch or of several, on one process or on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oodkern.methods.objective import Batch, Objective, Rows
from oodkern.ops._penalty import RandomState
from oodkern.processes import ALONE, Processes, is_sharded
from oodkern.schema import TrainConfig
from oodkern.training.memory import StillStatistics
from oodkern.training.replica import Replica


@dataclass(frozen=True)
class Pass:
    """What one forward pass takes: ID images, then outliers."""

    images: Tensor
    target: Tensor  # of the ID images
    indices: Tensor  # of the ID images in the training set


def passes_of(
    images: Tensor, target: Tensor, indices: Tensor, outliers: Tensor | None, count: int, split: bool
) -> list[Pass]:
    """`count` passes over a share of each side; with `split` as many over either side, ID images first."""
    known = zip(images.tensor_split(count), target.tensor_split(count), indices.tensor_split(count), strict=True)
    if outliers is None:
        return [Pass(*one) for one in known]
    unknown = outliers.tensor_split(count)
    if split:
        return [*(Pass(*one) for one in known), *(Pass(one, target[:0], indices[:0]) for one in unknown)]
    return [
        Pass(torch.cat([id_images, other]), of_target, of_indices)
        for (id_images, of_target, of_indices), other in zip(known, unknown, strict=True)
    ]


class Gradients:
    """Forms the gradients of a step, summed over the processes, and the step's loss and its parts.

    Where the loss is a sum over rows each pass has its part of it, with means over the counts of the whole step, and
    the backward pass of one comes before the forward pass of the next: memory is that of one pass.

    Where terms couple the rows (EDGE's gap, OAL's contrast, any loss that is not `separable`) the loss is formed of all
    rows. With several passes they are made twice: first without a graph, for the rows, of which the loss and its
    gradient are formed; then once more with the same random numbers, to send each pass's part of that gradient
    backward. (The cached gradient of Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup, RepL4NLP 2021.) Rows of other processes are gathered for it, and each process sends its own rows' part
    backward; with `gather_negatives=false` each has a loss of its own rows, and their mean counts.

    With normalisation by batch statistics a pass, and a process, has its own ones: gradients then equal those of one
    large batch only with frozen BatchNorm, or with none.
    """

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        config: TrainConfig,
        processes: Processes,
        autocast: Callable[[], torch.autocast],
        scaled: Callable[[Tensor], Tensor],
    ) -> None:
        self.replica, self.objective, self.processes = replica, objective, processes
        self.count, self.split = config.accumulate, config.split_forward
        self.parallel_head = config.parallel_head and processes.count > 1
        self.local = processes.count > 1 and not config.gather_negatives and not self.parallel_head
        self.gathered = ALONE if self.local else processes
        self.autocast, self.scaled = autocast, scaled

    def __call__(
        self,
        images: Tensor,
        outliers: Tensor | None,
        target: Tensor,
        indices: Tensor,
        counts: tuple[int, int],
        step: int,
    ) -> dict[str, Tensor]:
        """Adds to the parameters' gradients; returns the loss and its parts, whose sums over the processes count.

        `images` and `outliers` are this process's share; `target`, `indices` and `counts` of the whole step.
        """
        own = self.processes.share(counts[0])
        passes = passes_of(images, target[own], indices[own], outliers, self.count, self.split)
        alone = len(passes) == self.processes.count == 1
        if alone or (getattr(self.objective.loss, "separable", False) and not self.parallel_head):
            return self.one_by_one(passes, counts, step)
        return self.together(passes, Batch(None, target, counts, indices, step))

    def one_by_one(self, passes: list[Pass], counts: tuple[int, int], step: int) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for i, one in enumerate(passes):
            with self.replica.pass_over(last=i == len(passes) - 1):
                with self.autocast():
                    rows = (*self.replica(one.images), *self.given(one.images))
                    batch = Batch(one.images, one.target, counts, one.indices, step)
                    value, parts = self.objective.loss_of(self.replica.model, rows, batch)
                if value.requires_grad:  # of a part that the loss says nothing about it does not
                    self.scaled(value).backward()
            for name, part in {"loss": value.detach(), **parts}.items():
                total[name] = total[name] + part if name in total else part
        return total

    @torch.no_grad()
    def given(self, images: Tensor) -> Rows:
        return self.objective.given(images)

    def together(self, passes: list[Pass], whole: Batch) -> dict[str, Tensor]:
        again = len(passes) > 1
        if self.local:
            own = self.processes.share(whole.counts[0])
            lengths = sum(len(one.target) for one in passes), sum(len(one.images) - len(one.target) for one in passes)
            whole = Batch(None, whole.target[own], lengths, whole.indices[own], whole.step)
        random, rows, given = [], [], []
        for one in passes:
            random.append(RandomState(one.images))
            # An autocast for each pass: it would keep a weight that it cast without a graph.
            with torch.set_grad_enabled(not again), self.replica.pass_over(last=not again), self.autocast():
                rows.append(self.replica(one.images))
                given.append(self.given(one.images))
        random.append(RandomState(passes[0].images))
        leaves = [one.detach().requires_grad_() for one in self.joined(rows, passes)]
        parts, slopes, own_slopes = self.of_rows(leaves, self.joined(given, passes), whole)
        by_pass = list(zip(*(self.parted(slope, passes, whole.counts) for slope in slopes), strict=True))
        for i, one in enumerate(passes):
            last = i == len(passes) - 1
            with self.replica.pass_over(last=last):
                if again:
                    random[i].restore()
                    with StillStatistics(self.replica.network), self.autocast():
                        rows[i] = self.replica(one.images)
                send_backward(rows[i], by_pass[i], own_slopes if last else [])
                rows[i] = ()
        random[-1].restore()
        return parts

    def joined(self, rows: list[Rows], passes: list[Pass]) -> list[Tensor]:
        """Of all passes, and of the processes that are gathered: ID rows, then outliers'."""
        lengths = [len(one.target) for one in passes]
        found = []
        for column in zip(*rows, strict=True):
            known = torch.cat([one[:n] for one, n in zip(column, lengths, strict=True)])
            unknown = torch.cat([one[n:] for one, n in zip(column, lengths, strict=True)])
            found.append(torch.cat([self.gathered.gather(known), self.gathered.gather(unknown)]))
        return found

    def parted(self, rows: Tensor, passes: list[Pass], counts: tuple[int, int]) -> list[Tensor]:
        """This process's rows of what `joined` gives, pass by pass."""
        known, unknown = rows[: counts[0]], rows[counts[0] :]
        known = known[self.gathered.share(len(known))].split([len(one.target) for one in passes])
        unknown = unknown[self.gathered.share(len(unknown))].split(
            [len(one.images) - len(one.target) for one in passes]
        )
        return [torch.cat(sides) for sides in zip(known, unknown, strict=True)]

    def of_rows(
        self, leaves: list[Tensor], given: list[Tensor], whole: Batch
    ) -> tuple[dict[str, Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The loss and its parts, its gradient in the rows, and in parameters that it is formed of.

        Sums over the processes count: what all of them form alike is the first one's.
        """
        with self.autocast():
            value, parts = self.objective.loss_of(self.replica.model, (*leaves, *given), whole)
        share = 1 / self.processes.count if self.local else 1.0
        trained = self.replica.trained()
        found = torch.autograd.grad(self.scaled(value * share), [*leaves, *trained], allow_unused=True)
        slopes = [
            torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=False)
        ]
        if self.parallel_head:  # each has that of its own classes
            slopes = [self.gathered.sum(slope) for slope in slopes]
        own: list[tuple[Tensor, Tensor]] = []
        for one, slope in zip(trained, found[len(leaves) :], strict=True):
            if slope is None:
                continue
            if is_sharded(one):
                one.grad = slope
            else:
                own.append((one, slope if self.local or self.processes.first else torch.zeros_like(slope)))
        if not self.local and not self.processes.first:
            share = 0.0
        return {name: part * share for name, part in {"loss": value.detach(), **parts}.items()}, slopes, own


def send_backward(rows: Rows, slopes: tuple[Tensor, ...], own: list[tuple[Tensor, Tensor]]) -> None:
    """In one backward pass, since what sums gradients over processes expects all of them in it."""
    roots = [(row, slope) for row, slope in zip(rows, slopes, strict=True) if row.requires_grad] + own
    torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])
