"""What the trainer asks of a method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oodkern.ops import energy


def as_score(name: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """An outlier score [N] by its name, larger = more OOD: "energy" E at a temperature, or "msp" -max softmax."""
    if name == "energy":
        return energy(logits, temperature)
    if name == "msp":
        return -(logits.float().amax(-1) + energy(logits)).exp()
    raise ValueError(f"name: expected 'energy' or 'msp', got {name!r}")


class Method:
    """Binds a loss, its outlier stream and its score. `Options` is a dataclass: the schema of `loss.*` in a config."""

    name: ClassVar[str]
    Options: ClassVar[type]
    uses_outliers: ClassVar[bool] = True
    score_name: ClassVar[str]

    def __init__(self, options: Any) -> None:
        """Raises ValueError where the options do not make a loss: a run must not find that out after pretraining."""
        self.options = options
        self.make_loss()

    def make_loss(self, **decided: float) -> nn.Module:
        """The loss of the options, some of them replaced."""
        raise NotImplementedError

    def build_loss(self, id_logits: Tensor, outlier_logits: Tensor) -> tuple[nn.Module, dict[str, Any]]:
        """The loss, and what was decided for it from the starting model's logits of both training sets."""
        return self.make_loss(), {}

    def describe(self, decided: dict[str, Any]) -> str:
        """What was decided, in one line for a person."""
        return ", ".join(f"{name} {value}" for name, value in decided.items())

    @torch.no_grad()
    def score(self, logits: Tensor) -> Tensor:
        return as_score(self.score_name, logits)
