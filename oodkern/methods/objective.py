"""How the loss of a step is formed of a batch of images: what the trainer calls, and methods refine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from oodkern.processes import ALONE

Rows = tuple[Tensor, ...]
Loss = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """The rows that a loss is formed of: those of one step, or of one of the parts that are forwarded by themselves."""

    # [n, C, H, W] in [0, 1], on the model's device: ID images, then outliers. None where rows of several passes or
    # processes were joined, which is done for losses that are not `separable`.
    images: Tensor | None
    target: Tensor  # of the ID images, which are as many
    counts: tuple[int, int]  # ID images and outliers of the whole step
    indices: Tensor  # of the ID images in the training set
    step: int  # of the stage, from 0

    @property
    def of_whole(self) -> dict[str, tuple[int, int]]:
        """What a loss of a part of a step is told beside its rows; nothing of a whole step."""
        if self.images is None or (len(self.target), len(self.images) - len(self.target)) == self.counts:
            return {}
        return {"counts": self.counts}


class Objective:
    """A loss of logits, as the trainer forms it.

    `rows` is one forward pass, `loss_of` the loss and its parts of what came out of it; between the two the trainer may
    join the rows of several passes, and of several processes. Everything runs under the trainer's autocast.

    Methods that choose outliers ask for `candidates` of them at every `every`-th step, and `choose` from these at each.
    """

    candidates: int = 0  # outliers read at a time; 0: those of a step, all of which are taken
    every: int = 1

    def __init__(self, loss: nn.Module) -> None:
        self.loss: Any = loss
        self.fused = False  # whether the loss is formed of features and head: set by the trainer, of head=fused
        self.processes = ALONE  # that share each batch: set by the trainer
        # Around gradients that `loss_of` forms itself: set by the trainer, of where the parameters are.
        self.inner_gradient: Callable[[], AbstractContextManager[None]] = nullcontext

    def begin(self, progress: float) -> None:
        """Before a step, `progress` in [0, 1) of the stage: what of the loss is on."""

    def choose(self, model: Any, outliers: Tensor, step: int) -> Tensor:
        """This process's outliers of a step, of its share of those read last. Leaves the model in any mode."""
        return outliers

    def features_of(self, model: Any, images: Tensor) -> Tensor:
        """Features of images outside of a step's passes; set by the trainer where a call of the model will not do."""
        return model.features(images)

    def rows(self, model: Any, images: Tensor) -> Rows:
        """Of each image what the loss is formed of: its logits, or with a fused head its features."""
        return (model.features(images) if self.fused else model(images),)

    def given(self, images: Tensor) -> Rows:
        """What else of each image the loss is formed of, without a gradient, such as a teacher's outputs.

        Formed once where rows are formed twice, and handed to `loss_of` behind them.
        """
        return ()

    def loss_of(self, model: Any, rows: Rows, batch: Batch) -> Loss:
        """The loss and its parts of ID rows, as many as there are targets, and of outliers after them."""
        if self.fused:
            return self.loss_of_features(model, rows[0], batch)
        known, unknown = parted(rows[0], len(batch.target))
        return self.loss(known, batch.target, unknown, return_parts=True, **batch.of_whole)

    def loss_of_features(self, model: Any, features: Tensor, batch: Batch, **options: Any) -> Loss:
        head, count = model.head, len(batch.target)
        return self.loss.from_features(
            features, head.weight, head.bias, batch.target, count, return_parts=True, **batch.of_whole, **options
        )

    def check_epoch(self, means: Mapping[str, float]) -> None:
        """Raises ValueError where the means of an epoch's parts show that the method does nothing."""

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """The loss's own parameters, and their learning rates in units of the model's."""
        if hasattr(self.loss, "learning_rates"):
            return self.loss.learning_rates()
        return [(list(self.loss.parameters()), 1.0)]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {"loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])


def parted(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` rows and the others. No rows are no part of the graph."""
    return (rows[:count] if count else rows.new_zeros(0, *rows.shape[1:])), rows[count:]
