"""Separation (PFS): outlier features off the directions of the class weights, ID features drawn to their own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.losses._checks import check_counts, check_logit_rows, check_target
from oodkern.losses._slopes import Slopes
from oodkern.losses.base import Loss, OutlierLoss, Terms
from oodkern.losses.energy import EnergyLoss
from oodkern.losses.logits import GivenLogits, Logits
from oodkern.losses.outlier_exposure import OutlierExposureLoss
from oodkern.ops import orthonormal_basis, subspace_energy
from oodkern.ops._checks import check_choice, check_count, check_non_negative
from oodkern.ops._product import check_beside, check_matrix
from oodkern.processes import is_sharded

SEP_REDUCTIONS, SEPARATIONS = ("auto", "sum", "mean"), ("cosine", "projection")
MANY_CLASSES = 1000  # from here on the released code takes the mean over the classes


class SeparationLoss(OutlierLoss):
    """The loss of `outlier_loss`, and two terms of directions: x of the features, w_c of the class weights.

        ID rows   alpha * cluster,     cluster = -cos(x, w_y)
        OOD rows  beta * separation,   separation = sum_c |cos(x, w_c)|, or its mean over the classes;
                                       of a projection |U^T x|^2 / |x|^2, U an orthonormal basis of the weights' span

    At a small separation outliers are orthogonal to the space that the ID features collapse into. The class weights get
    no gradient of either term.

    Args:
        alpha: weight of `cluster` (1).
        beta: weight of `separation` (1). With the sum over K classes it is effectively K times larger.
        sep_reduction: "mean" is the paper's formula, "sum" what its code runs on CIFAR; "auto" as released: "sum"
            below 1,000 classes, "mean" from there on.
        outlier_loss: of the logits: Outlier Exposure at 0.5 by default, or an EnergyLoss (the energy variant).
        separation: "cosine", or "projection": onto the span of the class weights, which has no kink where a cosine is
            0 and costs r products of D numbers a row instead of K.
        rank: of the projection's subspace: the r leading right singular vectors of the weights. None: their span.
        refresh: in training the basis is made anew at every `refresh`-th call.
        reduction: "mean", "sum", "batchmean" or "none", see OutlierLoss.

    With K >= D the span is everything: |U^T x| = |x| whatever the features, and the loss warns of it (give a rank). The
    cosines cannot all vanish there either: at best their mean is about 0.02 at K = 100, D = 64.

    Parts: those of `outlier_loss`, `cluster`, `separation` (the mean over classes, or the projection's share). Where
    alpha or beta is 0 (stage I of the paper) the term is left out. Source: Wu et al., Pursuing Feature Separation based
    on Neural Collapse for Out-of-Distribution Detection, ICLR 2025.
    """

    basis: Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        sep_reduction: str = "auto",
        outlier_loss: OutlierExposureLoss | EnergyLoss | None = None,
        separation: str = "cosine",
        rank: int | None = None,
        refresh: int = 100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction, multi_label=False)
        self.alpha, self.beta = check_non_negative(alpha, "alpha"), check_non_negative(beta, "beta")
        self.sep_reduction = check_choice(sep_reduction, "sep_reduction", SEP_REDUCTIONS)
        self.separation = check_choice(separation, "separation", SEPARATIONS)
        self.outlier_loss = OutlierExposureLoss(0.5) if outlier_loss is None else outlier_loss
        if not isinstance(self.outlier_loss, OutlierExposureLoss | EnergyLoss) or self.outlier_loss.multi_label:
            raise ValueError("outlier_loss: expected a single-label OutlierExposureLoss or EnergyLoss")
        if rank is not None:
            check_count(rank, "rank", 1)
            if separation != "projection":
                raise ValueError(f"rank: expected with separation='projection' alone, got {rank}")
        check_count(refresh, "refresh", 1)
        self.rank, self.refresh = rank, refresh
        self.calls, self.basis, self.warned = 0, None, False

    def forward(  # type: ignore[override]  # directions come before logits
        self,
        features: Tensor,
        weight: Tensor,
        logits: Tensor,
        target: Tensor,
        features_ood: Tensor | None = None,
        logits_ood: Tensor | None = None,
        *,
        counts: tuple[int, int] | None = None,
        return_parts: bool = False,
    ) -> Loss:
        """The loss.

        Args:
            features: [N, D] of the in-distribution rows, or of all rows in the mixed style; float64, float32, bfloat16
                or float16.
            weight: [K, D] of the head; cast to the features' dtype where it has another.
            logits: [N, K] of the same rows.
            target: [N] integers in 0..K-1, negative for outliers (mixed style).
            features_ood, logits_ood: [M, D] and [M, K] of the outliers, which make the style split.
            counts, return_parts: as in `OutlierLoss.forward`.

        Returns, and from_features: as in `OutlierLoss`; through the cosines of `separation` differentiable once.
        """
        check_logit_rows(logits, logits_ood)
        (N, K), split = logits.shape, logits_ood is not None
        if split != (features_ood is not None):
            raise ValueError("features_ood, logits_ood: expected both of the outliers or neither, got one of them")
        check_matrix(weight, "weight", "K, D")
        if len(weight) != K:
            raise ValueError(f"weight: expected {K} rows, one for each class of the logits, got {list(weight.shape)}")
        check_beside(weight, "weight", logits, "logits", dtype=False)
        for rows, of, name in ((features, logits, "features"), (features_ood, logits_ood, "features_ood")):
            if rows is None or of is None:
                continue
            check_matrix(rows, name)
            if len(rows) != len(of) or rows.shape[1] != weight.shape[1]:
                raise ValueError(f"{name}: expected {[len(of), weight.shape[1]]}, got {list(rows.shape)}")
            check_beside(rows, name, logits, "logits", dtype=False)
        check_target(target, None, (N, K), False, split, logits, "logits")
        check_counts(counts, self.separable)
        self.prepare(weight)
        known = GivenLogits(logits, target, features, weight)
        if logits_ood is not None:
            unknown = GivenLogits(logits_ood, None, features_ood, weight)
            return self._split(known, target, unknown, (N, len(logits_ood)), counts, return_parts)
        return self._mixed(known, target, target < 0, counts, return_parts)

    def prepare(self, weight: Tensor) -> None:
        """Makes the basis of the projection anew where it is due."""
        if self.separation != "projection" or self.beta == 0:
            return
        if is_sharded(weight):
            raise ValueError(
                "separation: expected 'cosine' with a head_weight that is a DTensor, got 'projection', whose basis is "
                "made of all class weights"
            )
        (K, D), rank = weight.shape, self.rank
        if (K if rank is None else min(rank, K)) >= D and not self.warned:
            self.warned = True
            warnings.warn(
                f"separation='projection': {K} class weights span all {D} dimensions of the features, and none has a "
                f"part outside; give a rank below {D}",
                stacklevel=4,
            )
        basis = self.basis
        if basis is None or len(basis) != D or (self.training and self.calls % self.refresh == 0):
            # Widened: of 16-bit weights the numerical rank would be that of their rounding, 0 from D = 128 (bfloat16).
            self.basis = orthonormal_basis(reference.widen(weight.detach()), None if rank is None else min(rank, K, D))
        else:
            self.basis = basis.to(weight.device)
        if self.training:
            self.calls += 1

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        terms = self.outlier_loss.id_terms(logits, target, skip)
        return {**terms, "cluster": (self.alpha, -logits.own_cosine(target))} if self.alpha else terms

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        terms = self.outlier_loss.ood_terms(logits, skip)
        if self.beta == 0:
            return terms
        if self.separation == "projection":
            return {**terms, "separation": (self.beta, self.inside_share(logits))}
        return {**terms, "separation": (self.beta * self.times(logits.classes), logits.alignment())}

    def times(self, classes: int) -> int:
        """What the mean over the classes is multiplied by."""
        summed = classes < MANY_CLASSES if self.sep_reduction == "auto" else self.sep_reduction == "sum"
        return classes if summed else 1

    def inside_share(self, logits: Logits) -> Tensor:
        """|U^T x|^2 / |x|^2, 0 of a row of zeros."""
        features, _ = logits.geometry()
        assert self.basis is not None
        basis = self.basis.to(features.dtype) if features.dtype == torch.float64 else self.basis
        inside, outside = subspace_energy(reference.widen(features), basis)
        whole = inside + outside
        return torch.where(whole > 0, inside / torch.where(whole > 0, whole, 1.0), 0.0)

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        return self.outlier_loss.slopes(classes)

    def get_extra_state(self) -> dict[str, Any]:
        return {"basis": self.basis, "calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.basis, self.calls = state["basis"], state["calls"]

    def extra_repr(self) -> str:
        projection = f", rank={self.rank}, refresh={self.refresh}" if self.separation == "projection" else ""
        return (
            f"alpha={self.alpha}, beta={self.beta}, sep_reduction={self.sep_reduction!r}, "
            f"separation={self.separation!r}{projection}, reduction={self.reduction!r}"
        )
