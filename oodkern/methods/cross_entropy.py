"""`ce`: plain training, the baseline; no outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from oodkern.losses import ClassificationLoss
from oodkern.methods.base import Method, Setting


@dataclass
class CrossEntropyOptions:
    """This method has no options."""


class CrossEntropy(Method):
    name = "ce"
    Options = CrossEntropyOptions
    uses_outliers = False
    score_names = ("energy", "joint_energy")

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        return ClassificationLoss(multi_label=self.multi_label)
