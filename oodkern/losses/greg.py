"""GReg: energy hinges, and a penalty on the input gradient of the energy where it is right already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern import reference
from oodkern.losses.base import COUPLED, Loss
from oodkern.losses.energy import EnergyLoss
from oodkern.ops._checks import check_choice, check_floating, check_non_negative, check_tensor

GRADIENT_SCALES = ("code", "paper")


class GRegLoss(EnergyLoss):
    """EnergyLoss + beta * penalty, the penalty on ||grad_x S(x)|| of the samples that are detected correctly.

        penalty = mean_i 1[S_i <= margin_in] ||grad S_i|| over the ID rows
                + mean_j 1[S_j >= margin_out] ||grad S_j|| over the OOD rows,   S = E (multi-label: -J)

    A sample either has a hinge (its energy is on the wrong side of its margin) or a penalty. The loss is given the
    penalty, which needs inputs and network, as a scalar:

        weight = loss.penalty_weight(S, is_ood)
        penalty = oodkern.gradient_penalty(lambda x: oodkern.energy(model(x)), inputs, weight)
        value = loss(logits, target, penalty)

    Args:
        alpha: weight of the hinges (0.1).
        beta: weight of the penalty (1).
        gradient_scale: "code" divides the penalty by n_in + n_out: the released code differentiates the mean of the
            scores and averages the norms over all rows, so what was run with weight 1 is 1/192 of the formula above at
            64 ID rows and 128 outliers. "paper" is the formula.
        margin_in, margin_out, temperature, reduction, multi_label: as in EnergyLoss; the reduction is of the rows'
            terms ("none" has no place for the penalty and is not known).

    Parts: those of EnergyLoss, and `gradient` (the penalty before beta). Source: Sharifi et al., Gradient-Regularized
    Out-of-Distribution Detection, ECCV 2024.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        margin_in: float = -25.0,
        margin_out: float = -7.0,
        gradient_scale: str = "code",
        temperature: float = 1.0,
        reduction: str = "mean",
        multi_label: bool = False,
    ) -> None:
        check_choice(reduction, "reduction", COUPLED)
        super().__init__(alpha, margin_in, margin_out, temperature, reduction, multi_label)
        self.beta = check_non_negative(beta, "beta")
        self.gradient_scale = check_choice(gradient_scale, "gradient_scale", GRADIENT_SCALES)

    def penalty_weight(self, score: Tensor, is_ood: Tensor, counts: tuple[int, int] | None = None) -> Tensor:
        """The weight of each sample's gradient norm, for `oodkern.gradient_penalty`.

        1 / n_in for ID samples with S <= margin_in, 1 / n_out for outliers with S >= margin_out, 0 elsewhere; with
        gradient_scale="code" divided by n_in + n_out.

        Args:
            score: [N], the energies (multi-label: -J) of the samples.
            is_ood: [N] bool, which of them are outliers.
            counts: n_in and n_out, where these samples are not all of the batch.

        Returns:
            [N], without a gradient, float32 (float64 for float64 scores).
        """
        check_floating(score, "score")
        check_tensor(is_ood, "is_ood")
        if is_ood.dtype != torch.bool or is_ood.shape != score.shape or score.dim() != 1:
            raise ValueError(
                f"score, is_ood: expected [N] and bool [N], got {list(score.shape)} and {is_ood.dtype} "
                f"{list(is_ood.shape)}"
            )
        score, outliers = reference.widen(score.detach()), is_ood.sum()
        n_in, n_out = (len(score) - outliers, outliers) if counts is None else counts
        rows = len(score) if counts is None else n_in + n_out
        detected = torch.where(is_ood, score >= self.margin_out, score <= self.margin_in)
        weight = detected / torch.where(is_ood, n_out, n_in).clamp_min(1).to(score)
        return weight / max(rows, 1) if self.gradient_scale == "code" else weight

    def forward(  # type: ignore[override]  # the penalty comes before what makes the style split
        self,
        logits: Tensor,
        target: Tensor,
        penalty: Tensor | None = None,
        logits_ood: Tensor | None = None,
        *,
        is_ood: Tensor | None = None,
        counts: tuple[int, int] | None = None,
        return_parts: bool = False,
    ) -> Loss:
        """The loss; `penalty` is a scalar, or None where there is none. The rest is as in `OutlierLoss.forward`."""
        check_penalty(penalty)
        found = super().forward(logits, target, logits_ood, is_ood=is_ood, counts=counts, return_parts=return_parts)
        return self.penalised(found, penalty)

    def from_features(self, *arguments: Any, penalty: Tensor | None = None, **options: Any) -> Loss:
        """As `OutlierLoss.from_features`, with a penalty."""
        check_penalty(penalty)
        return self.penalised(super().from_features(*arguments, **options), penalty)

    def penalised(self, found: Loss, penalty: Tensor | None) -> Loss:
        if penalty is None:
            return found
        if isinstance(found, Tensor):
            return found + self.beta * penalty
        value, parts = found
        return value + self.beta * penalty, parts | {"gradient": penalty.detach()}

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gradient_scale={self.gradient_scale!r}, {super().extra_repr()}"


def check_penalty(penalty: Any) -> None:
    if penalty is None:
        return
    check_floating(penalty, "penalty")
    if penalty.dim():
        raise ValueError(f"penalty: expected a scalar, such as of oodkern.gradient_penalty, got {list(penalty.shape)}")
