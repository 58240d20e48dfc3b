"""Plain classification: the baseline of all methods."""

from __future__ import annotations

from torch import Tensor

from oodkern.losses.base import OutlierLoss, Terms


class ClassificationLoss(OutlierLoss):
    """CE(z, y), or BCE(z, y) with multi_label, over the ID rows; outliers count nothing.

    The loss that the others extend, in their calling styles, so that a baseline is trained by the same code. Part:
    `ce` (`bce`). Shapes, dtypes and reductions: `OutlierLoss`.
    """

    def __init__(self, reduction: str = "mean", multi_label: bool = False) -> None:
        super().__init__(reduction, multi_label)

    def id_terms(self, logits: Tensor, target: Tensor, score: Tensor, skip: Tensor | None = None) -> Terms:
        return {"bce" if self.multi_label else "ce": (1.0, self.classification(logits, target, score))}

    def ood_terms(self, logits: Tensor, score: Tensor, skip: Tensor | None = None) -> Terms:
        return {}
