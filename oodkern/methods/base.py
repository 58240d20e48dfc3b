"""What the trainer asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from oodkern.classifier import Classifier, Output
from oodkern.data import OODSplit
from oodkern.methods.objective import Objective
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


@dataclass(frozen=True)
class Setting:
    """What a method's stage begins with."""

    model: Classifier  # the starting model, in evaluation mode; not the one that is trained
    split: OODSplit
    batch_size: int  # ID images a step
    outlier_batch_size: int
    seed: int
    load_classifier: Callable[[str], Classifier]  # of a run folder or a checkpoint of one; ConfigError


class Method:
    """Binds a loss, its outlier stream and its score. `Options` is a dataclass: the schema of `loss.*` in a config."""

    name: ClassVar[str]
    Options: ClassVar[type]
    uses_outliers: ClassVar[bool] = True
    parallel_head: ClassVar[bool] = True  # whether a share of the classes will do for a process: see losses.parallel
    score_names: ClassVar[tuple[str | None, str | None]]  # of single- and multi-label classifiers; None: not for them

    def __init__(self, options: Any, multi_label: bool = False) -> None:
        """Raises ValueError where the options do not make a loss: a run must not find that out after pretraining."""
        self.options, self.multi_label = options, multi_label
        if self.score_names[multi_label] is None:
            kind, other = ("multi-label", "single-label") if multi_label else ("single-label", "multi-label")
            raise ValueError(f"method: {self.name} is for {other} data, and data.name is {kind}")
        self.build_loss({})

    def check_batches(self, batch_size: int, outlier_batch_size: int) -> None:
        """Raises ValueError where ID images and outliers a step do not go with the options."""

    def check(self, setting: Setting) -> None:
        """Raises ValueError where what the method's stage will begin with does not go with the options.

        Before pretraining, hence with a model that is not trained; and, unlike what `__init__` checks, not where a run
        is judged, which needs no files of the options.
        """

    @property
    def score_name(self) -> str:
        name = self.score_names[self.multi_label]
        assert name is not None
        return name

    def score(self, outputs: Output, weight: Tensor) -> Tensor:
        """The outlier score [N], larger = more OOD, of what a model makes of images and of its head's weight [K, D]."""
        return as_score(self.score_name, outputs.logits)

    @property
    def coupled(self) -> str:
        """Which terms of the loss see all rows of a step at once; nothing where it is a sum over rows."""
        return ""

    def decide(self, id_logits: Tensor, outlier_logits: Tensor) -> dict[str, Any]:
        """What the loss takes from the starting model's logits of both training sets, such as margins: plain values."""
        return {}

    def watch(self, decided: Mapping[str, Any], id_logits: Tensor, outlier_logits: Tensor) -> dict[str, float]:
        """What the log keeps of the logits of held-out images beside accuracy and AUROC: names, `validation_...`."""
        return {}

    def warning(self, decided: Mapping[str, Any], watched: Mapping[str, float]) -> str:
        """What a person should know of `watch`'s last numbers, in one line; "" where they are as they should be."""
        return ""

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        """The loss of the options and of what was decided; of the options alone, to check them, where there is none."""
        raise NotImplementedError

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        """What the method's stage trains."""
        return Objective(self.build_loss(decided, setting))

    def sketch(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        """An objective whose steps take the memory that those of `objective` take at most, without a look at data.

        Its tensors have the right sizes and any numbers that are finite. For `oodkern plan`.
        """
        return self.objective(decided, setting)

    def describe(self, decided: dict[str, Any]) -> str:
        """What was decided, in one line for a person."""
        return ", ".join(f"{name} {value}" for name, value in decided.items())


def check_share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")


def generator_of(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of one step, the same whether or not the run was resumed before it."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
