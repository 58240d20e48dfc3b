"""`oe`: Outlier Exposure, scored by the maximum softmax probability (multi-label: by JointEnergy)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from oodkern._options import option
from oodkern.losses import OutlierExposureLoss
from oodkern.methods.base import Method, Setting


@dataclass
class OutlierExposureOptions:
    """Of the flat softmax that outliers are taught."""

    alpha: float = option(0.5, "weight of the outliers' term")


class OutlierExposure(Method):
    name = "oe"
    Options = OutlierExposureOptions
    score_names = ("msp", "joint_energy")

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        return OutlierExposureLoss(alpha=self.options.alpha, multi_label=self.multi_label)
