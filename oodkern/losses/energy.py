"""Energy fine-tuning: ID energies are pushed under one margin, outliers' over another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oodkern.losses._slopes import Slope, Slopes
from oodkern.losses.base import OutlierLoss, Terms
from oodkern.losses.logits import Logits
from oodkern.ops._checks import check_non_negative, check_temperature


class EnergyLoss(OutlierLoss):
    """CE(z, y) + alpha * relu(E - margin_in)^2 over the ID rows + alpha * relu(margin_out - E)^2 over the OOD rows.

    E = -T logsumexp(z / T), low for in-distribution inputs, so margin_in < margin_out. The multi-label variant has
    BCE(z, y) and E = -JointEnergy = -sum_c softplus(z_c): the margins are in that space, hence negative too.

    Args:
        alpha: weight of both hinges (0.1 in the paper).
        margin_in: ID energies above it are penalised, in units of the logits.
        margin_out: OOD energies below it are penalised. The defaults are the paper's for CIFAR-sized networks (its
            script: -23 / -5 for CIFAR-10, -27 / -5 for CIFAR-100); they depend on the scale of the logits, and
            margins that do not fit ruin the ID accuracy: look at your energies first.
        temperature: T > 0 of the energy; the classification term is always at 1.
        reduction: "mean", "sum", "batchmean" or "none", see OutlierLoss.
        multi_label: targets are [N, K] of 0 and 1.

    Parts: `ce` (`bce`), `energy_in`, `energy_out` (the squared hinges before alpha). Shapes, dtypes and calling
    styles: `OutlierLoss.forward`.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        margin_in: float = -25.0,
        margin_out: float = -7.0,
        temperature: float = 1.0,
        reduction: str = "mean",
        multi_label: bool = False,
    ) -> None:
        super().__init__(reduction, multi_label)
        self.alpha = check_non_negative(alpha, "alpha")
        self.temperature = check_temperature(temperature)
        if not (math.isfinite(margin_in) and math.isfinite(margin_out) and margin_in < margin_out):
            raise ValueError(
                f"margin_in, margin_out: expected finite numbers with margin_in < margin_out, since energies of ID "
                f"inputs are the lower ones; got {margin_in} and {margin_out}"
            )
        if multi_label and self.temperature != 1.0:
            raise ValueError("temperature: JointEnergy has none; expected 1.0 with multi_label=True")
        self.margin_in, self.margin_out = float(margin_in), float(margin_out)

    def tempered(self, logits: Logits) -> Tensor:
        """The energy that the margins speak of."""
        return -logits.joint_energy() if self.multi_label else logits.energy(self.temperature)

    def hinge(self, distance: Tensor, skip: Tensor | None) -> Tensor:
        """relu(d)^2. Rows that do not count are skipped before the square, whose slope at an infinite d is NaN."""
        outside = distance.relu() if skip is None else torch.where(skip, 0.0, distance.relu())
        return outside * outside

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        above = self.hinge(self.tempered(logits) - self.margin_in, skip)
        return {**self.classification(logits), "energy_in": (self.alpha, above)}

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        return {"energy_out": (self.alpha, self.hinge(self.margin_out - self.tempered(logits), skip))}

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        # The energy that the margins speak of is -J in multi-label tasks: hinges and margins of J have the other sign.
        key, sign = (("joint_energy", 1.0), -1.0) if self.multi_label else (("energy", self.temperature), 1.0)
        known = dict(self.classification_slope(classes))
        linear = known.get(key, Slope()).linear
        known[key] = Slope(linear, sign * self.alpha, sign * self.margin_in)
        return known, {key: Slope(0.0, -sign * self.alpha, sign * self.margin_out)}

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, margin_in={self.margin_in}, margin_out={self.margin_out}, "
            f"temperature={self.temperature}, reduction={self.reduction!r}, multi_label={self.multi_label}"
        )
