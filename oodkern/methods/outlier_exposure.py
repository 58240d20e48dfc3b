"""`oe`: Outlier Exposure, scored by the maximum softmax probability."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from oodkern.losses import OutlierExposureLoss
from oodkern.methods.base import Method


@dataclass
class OutlierExposureOptions:
    alpha: float = 0.5


class OutlierExposure(Method):
    name = "oe"
    Options = OutlierExposureOptions
    score_name = "msp"

    def make_loss(self, **decided: float) -> nn.Module:
        return OutlierExposureLoss(alpha=self.options.alpha)
