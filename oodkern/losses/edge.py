"""EDGE: the energy gap between the ID samples of low energy and unknown ones, in multi-label tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from oodkern.losses._slopes import Slope, Slopes
from oodkern.losses.base import COUPLED, OutlierLoss, Terms
from oodkern.losses.logits import Logits
from oodkern.ops import pairwise_hinge
from oodkern.ops._checks import check_choice, check_margin, check_non_negative, check_tensor

TAILS = ("energy", "frequency")


class EDGELoss(OutlierLoss):
    """BCE(z, y) over the ID rows + alpha * mean_c softplus(z_c) over the OOD rows + beta * gap.

        gap = mean over outliers j and tail rows i of relu(J_j - J_i + margin),   J = sum_c softplus(z_c)

    The tail are ID rows of the batch, chosen without a gradient: those of the lowest JointEnergy, which the model is
    least sure of, or those with the rarest labels. J is high for in-distribution inputs; the outliers' second term is
    J / K, and sum_c BCE_c = J - sum_{c in y} z_c, so that one reduction of a row's logits makes all three terms.

    Args:
        alpha: weight of the outliers' term (1 in the paper).
        beta: weight of the gap (0.1); the released script sets it to 0 for the first half of training, which is up to
            the caller (attribute `beta`).
        margin: m of the gap, in units of J (the released command: 0; its argparse default: 1).
        tail_fraction: share of the ID rows that are the tail, one row at least (32 of 128 in the released command).
        tail: "energy" as released, or "frequency": rows whose rarest label has the smallest of `class_counts`, the
            lower J first of equal ones; rows without labels come last.
        class_counts: [K], how often each label occurs in training; for tail="frequency".
        reduction: "mean", "sum" or "batchmean", see OutlierLoss; the gap counts as a term of the outliers. A pair
            belongs to no row, so there is no "none".

    Targets are [N, K] of 0 and 1. Parts: `bce`, `conf`, `gap` (absent where beta is 0). Where ID rows or outliers are
    missing the gap is 0. Shapes, dtypes and calling styles: `OutlierLoss.forward`. Differentiable twice. (In the mixed
    style the number of outliers is data: torch.compile breaks its graph there.)

    Source: Sun et al., EDGE, AAAI 2025, and its released code, which forms log(1 + exp z) and -log(1 - sigmoid z) as
    written and overflows from z = 88 and z = 17 on (here: softplus), and takes `k` = 32 rows for any batch.
    """

    class_counts: Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        margin: float = 0.0,
        tail_fraction: float = 0.25,
        tail: str = "energy",
        class_counts: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction, multi_label=True, reductions=COUPLED)
        self.alpha, self.beta = check_non_negative(alpha, "alpha"), check_non_negative(beta, "beta")
        self.margin = check_margin(margin)
        if not 0 < check_non_negative(tail_fraction, "tail_fraction") <= 1:
            raise ValueError(f"tail_fraction: expected a share in (0, 1], got {tail_fraction}")
        self.tail_fraction = float(tail_fraction)
        self.tail = check_choice(tail, "tail", TAILS)
        if (class_counts is None) != (tail == "energy"):
            raise ValueError(f"class_counts: expected with tail='frequency' alone, got {type(class_counts).__name__}")
        if class_counts is not None:
            check_tensor(class_counts, "class_counts")
            if class_counts.dim() != 1:
                raise ValueError(f"class_counts: expected [K], got {list(class_counts.shape)}")
        self.register_buffer("class_counts", class_counts, persistent=False)

    @property
    def separable(self) -> bool:
        return self.beta == 0 and super().separable

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        return self.classification(logits)

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        return {"conf": (self.alpha, logits.joint_energy() / max(logits.classes, 1))}

    def pair_terms(self, known: Logits, unknown: Logits, target: Tensor, is_ood: Tensor | None) -> Terms:
        if self.beta == 0:
            return {}
        id_score, ood_score = known.joint_energy(), unknown.joint_energy()
        if is_ood is not None:
            id_score, ood_score, target = id_score[~is_ood], ood_score[is_ood], target[~is_ood]
        tail = self.tail_of(id_score.detach(), target)
        return {"gap": (self.beta, pairwise_hinge(id_score[tail], ood_score, self.margin))}

    def tail_of(self, score: Tensor, target: Tensor) -> Tensor:
        """Indices of the tail rows among rows of JointEnergy `score` [N] and labels `target` [N, K]."""
        order = score.argsort(stable=True)
        if self.class_counts is not None:
            counts = self.class_counts.to(score)
            if len(counts) != target.shape[1]:
                raise ValueError(f"class_counts: expected {target.shape[1]}, one for each class, got {len(counts)}")
            rarest = torch.where(target > 0, counts, torch.inf).amin(-1) if len(counts) else score
            order = order[rarest[order].argsort(stable=True)]
        return order[: max(round(self.tail_fraction * len(score)), 1)]

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        known = self.classification_slope(classes)
        if self.beta:  # the gap's slopes depend on all rows
            return {}, {}
        return known, {key: Slope(self.alpha * slope.linear) for key, slope in known.items()}

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, margin={self.margin}, tail_fraction={self.tail_fraction}, "
            f"tail={self.tail!r}, reduction={self.reduction!r}"
        )
