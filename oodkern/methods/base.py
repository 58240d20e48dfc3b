"""What the trainer asks of a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oodkern.ops import energy, joint_energy

# The scores of a plain classifier, which methods have to beat.
BASELINE_SCORES, MULTI_LABEL_BASELINE_SCORES = ("msp", "energy"), ("max_logit", "joint_energy")


def as_score(name: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """An outlier score [N] of logits [N, K] by its name, larger = more OOD.

    "energy" is E at a temperature, "msp" minus the maximum softmax probability; for multi-label classifiers
    "joint_energy" is -J and "max_logit" minus the largest logit.
    """
    if name == "energy":
        return energy(logits, temperature)
    if name == "msp":
        return -(logits.float().amax(-1) + energy(logits)).exp()
    if name == "joint_energy":
        return -joint_energy(logits)
    if name == "max_logit":
        return -logits.float().amax(-1)
    raise ValueError(f"name: expected one of energy, msp, joint_energy, max_logit, got {name!r}")


class Method:
    """Binds a loss, its outlier stream and its score. `Options` is a dataclass: the schema of `loss.*` in a config."""

    name: ClassVar[str]
    Options: ClassVar[type]
    uses_outliers: ClassVar[bool] = True
    score_names: ClassVar[tuple[str, str]]  # of a multi-class and of a multi-label classifier

    def __init__(self, options: Any, multi_label: bool = False) -> None:
        """Raises ValueError where the options do not make a loss: a run must not find that out after pretraining."""
        self.options, self.multi_label = options, multi_label
        self.build_loss({})

    @property
    def score_name(self) -> str:
        return self.score_names[self.multi_label]

    def decide(self, id_logits: Tensor, outlier_logits: Tensor) -> dict[str, Any]:
        """What the loss takes from the starting model's logits of both training sets, such as margins."""
        return {}

    def build_loss(self, decided: Mapping[str, Any]) -> nn.Module:
        """The loss of the options and of what was decided; of the options alone where that is empty."""
        raise NotImplementedError

    def describe(self, decided: dict[str, Any]) -> str:
        """What was decided, in one line for a person."""
        return ", ".join(f"{name} {value}" for name, value in decided.items())

    @torch.no_grad()
    def score(self, logits: Tensor) -> Tensor:
        return as_score(self.score_name, logits)
