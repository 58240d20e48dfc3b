"""`ce`: plain training, the baseline; no outliers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from oodkern.losses import ClassificationLoss
from oodkern.methods.base import Method


@dataclass
class CrossEntropyOptions:
    pass


class CrossEntropy(Method):
    name = "ce"
    Options = CrossEntropyOptions
    uses_outliers = False
    score_name = "energy"

    def make_loss(self, **decided: float) -> nn.Module:
        return ClassificationLoss()
