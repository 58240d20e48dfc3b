"""Outlier Exposure: outliers are taught a flat softmax."""

from __future__ import annotations

from torch import Tensor

from oodkern.losses._slopes import Slope, Slopes
from oodkern.losses.base import OutlierLoss, Terms
from oodkern.losses.logits import Logits
from oodkern.ops._checks import check_non_negative


class OutlierExposureLoss(OutlierLoss):
    """CE(z, y) over the ID rows + alpha * [logsumexp(z) - mean_c z_c] over the OOD rows.

    The bracket is the cross-entropy of the softmax to the uniform distribution, -(1/K) sum_c log softmax_c. The
    multi-label variant is BCE(z, y) + alpha * mean_c softplus(z_c): binary cross-entropy to "no label", which is
    JointEnergy / K and the confidence term of EDGE.

    Args:
        alpha: weight of the OOD part (0.5 in the paper).
        reduction: "mean", "sum", "batchmean" or "none", see OutlierLoss. ("mean" is the paper's; the loss of the
            same name in pytorch-ood averages over the whole mixed batch, which is "batchmean" here.)
        multi_label: targets are [N, K] of 0 and 1.

    Parts: `ce` (`bce`), `oe`. Shapes, dtypes and calling styles: `OutlierLoss.forward`.

    Source: Hendrycks, Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019.
    """

    def __init__(self, alpha: float = 0.5, reduction: str = "mean", multi_label: bool = False) -> None:
        super().__init__(reduction, multi_label)
        self.alpha = check_non_negative(alpha, "alpha")

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        return self.classification(logits)

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        if self.multi_label:
            return {"oe": (self.alpha, logits.joint_energy() / max(logits.classes, 1))}
        mean = logits.mean()
        return {"oe": (self.alpha, -logits.energy() - mean)}

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        known = self.classification_slope(classes)
        return known, {key: Slope(self.alpha * slope.linear) for key, slope in known.items()}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}, multi_label={self.multi_label}"
