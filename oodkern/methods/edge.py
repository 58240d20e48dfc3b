"""`edge`: the energy gap between the tail of the ID samples and the outliers; multi-label, scored by JointEnergy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oodkern._options import option
from oodkern.losses import EDGELoss
from oodkern.methods.base import Method, Setting, check_share
from oodkern.methods.objective import Objective


@dataclass
class EDGEOptions:
    """Of the outliers' confidence and of the gap."""

    alpha: float = option(1.0, "weight of the outliers' mean JointEnergy")
    beta: float = option(0.1, "weight of the gap between tail and outliers")
    margin: float = option(0.0, "of the gap, in units of JointEnergy")
    tail_fraction: float = option(0.25, "share of a batch's ID samples that are its tail")
    tail: str = option("energy", "energy: the least sure samples; frequency: those with the rarest labels")
    gap_start: float = option(0.5, "share of the training after which the gap counts")


class Edge(Method):
    name = "edge"
    Options = EDGEOptions
    score_names = (None, "joint_energy")

    def __init__(self, options: EDGEOptions, multi_label: bool = False) -> None:
        super().__init__(options, multi_label)
        check_share(options.gap_start, "loss.gap_start")

    @property
    def coupled(self) -> str:
        return "the gap" if self.options.beta else ""

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        options, counts = self.options, None
        if options.tail == "frequency":
            counts = torch.ones(1) if setting is None else setting.split.train.labels.sum(0)
        return EDGELoss(options.alpha, options.beta, options.margin, options.tail_fraction, options.tail, counts)

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        return EdgeObjective(self.build_loss(decided, setting), self.options)


class EdgeObjective(Objective):
    def __init__(self, loss: nn.Module, options: EDGEOptions) -> None:
        super().__init__(loss)
        self.options = options

    def begin(self, progress: float) -> None:
        self.loss.beta = self.options.beta if progress >= self.options.gap_start else 0.0
