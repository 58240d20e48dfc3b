"""Plain classification: the baseline of all methods."""

from __future__ import annotations

from torch import Tensor

from oodkern.losses._slopes import Slopes
from oodkern.losses.base import OutlierLoss, Terms
from oodkern.losses.logits import Logits


class ClassificationLoss(OutlierLoss):
    """CE(z, y), or BCE(z, y) with multi_label, over the ID rows; outliers count nothing.

    The loss that the others extend, in their calling styles, so that a baseline is trained by the same code. Part:
    `ce` (`bce`). Shapes, dtypes and reductions: `OutlierLoss`.
    """

    def __init__(self, reduction: str = "mean", multi_label: bool = False) -> None:
        super().__init__(reduction, multi_label)

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        return self.classification(logits)

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        return {}

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        return self.classification_slope(classes), {}
