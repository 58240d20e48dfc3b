"""A step of a stage as a meter sees it, of fake tensors or of real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from oodkern.methods import Objective
from oodkern.training.meter import WORK, Meter
from oodkern.training.stage import Stage

# What a step holds: `kept` are the starting model, a teacher and banks of outliers, which are not trained.
KINDS = ("parameters", "kept", "gradients", "optimizer", WORK)


@dataclass(frozen=True)
class Peak:
    """The most bytes that a step holds at once, and what they are, of KINDS."""

    bytes: int
    kinds: Mapping[str, int]


class Images:
    """A batch for a step of a stage: images, made by `make(size, device=)`, targets, and outliers as they are read."""

    def __init__(self, stage: Stage, shape: tuple[int, int, int], make: Callable[..., Tensor]) -> None:
        count, device = stage.id_batches.batch_size, stage.device
        self.known = make((count, *shape), device=device).contiguous(memory_format=stage.format)
        labels = stage.labels
        self.target = torch.zeros((count, *labels.shape[1:]), dtype=labels.dtype, device=device)
        self.indices = torch.arange(count) % len(labels)
        self.outliers: Tensor | None = None
        if stage.outlier_batches is not None:
            read = stage.outlier_batches.batch_size
            self.outliers = make((read, *shape), device=device).contiguous(memory_format=stage.format)


def metered(stage: Stage, kept: nn.Module, meter: Meter, images: Images) -> Peak:
    """The peak of a step that is not the first, hence with the optimizer's state. To be called inside of the meter."""
    loss: Any = stage.objective.loss
    meter.hold([*kept.parameters(), *kept.buffers(), *tensors_of(stage.objective)], "kept")
    meter.hold([*stage.parameters, *stage.model.buffers(), *loss.buffers()], "parameters")
    meter.hold_gradients(stage.parameters, "gradients")
    for one in stage.parameters:
        one.grad = torch.zeros_like(one)
    stage.optimizer.step()
    meter.hold(tree_leaves(list(stage.optimizer.state.values())), "optimizer")
    stage.optimizer.zero_grad(set_to_none=True)
    meter.begin()
    step(stage, images)
    return Peak(meter.peak, {kind: meter.at_peak.get(kind, 0) for kind in KINDS})


def tensors_of(objective: Objective) -> list[Tensor]:
    """Those that an objective brings along."""
    found: list[Tensor] = []
    for one in tree_leaves(list(vars(objective).values())):
        if isinstance(one, nn.Module):
            found += [*one.parameters(), *one.buffers()]
        elif isinstance(one, Tensor):
            found.append(one)
    return found


def step(stage: Stage, images: Images) -> None:
    """`Stage.advance`, but for what looks at numbers, with all of the method's terms on."""
    stage.objective.begin(max(stage.steps - 1, 0) / max(stage.steps, 1))
    outliers = images.outliers
    if outliers is not None:
        with stage.autocast():
            outliers = stage.objective.choose(stage.model, outliers, stage.step)
    stage.set_training()
    stage.optimizer.zero_grad(set_to_none=True)
    counts = len(images.target), stage.outliers_per_step
    stage.gradients(images.known, outliers, images.target, images.indices, counts, stage.step)
    stage.optimizer.step()
