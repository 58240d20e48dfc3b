"""Margins for the energies of a trained model, and what published ones would do there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodkern.classifier import Classifier
from oodkern.data import ImageSet
from oodkern.methods import as_score
from oodkern.methods.energy import ID_QUANTILE, OUTLIER_QUANTILE, auto_margins, violations
from oodkern.metrics import auroc
from oodkern.tables import aligned
from oodkern.training.evaluation import scored

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Of the energy fine-tuning paper (Liu et al., NeurIPS 2020) and its released scripts, for WRN-40-2.
PUBLISHED = {"paper": (-25.0, -7.0), "its script for CIFAR-10": (-23.0, -5.0), "for CIFAR-100": (-27.0, -5.0)}


@dataclass(frozen=True)
class Calibration:
    """Energies of held-out ID images [N] and outliers [M], and the margins that they propose.

    Of single-label classifiers E = -T logsumexp(z / T), of multi-label ones minus the JointEnergy: low for ID.
    """

    id_energies: Tensor
    outlier_energies: Tensor
    margin_in: float
    margin_out: float
    temperature: float = 1.0

    @property
    def separate(self) -> bool:
        """Whether the quartiles that become margins lie in the order that the hinges need."""
        lower, upper = self.id_energies.quantile(ID_QUANTILE), self.outlier_energies.quantile(OUTLIER_QUANTILE)
        return bool(lower < upper)

    @property
    def auroc(self) -> float:
        return auroc(self.id_energies, self.outlier_energies)

    @property
    def words(self) -> str:
        """The proposal as `oodkern train` takes it, to four digits or a hundredth of the margins' distance."""
        # Energies of many classes are large and close: -1234.6 and -1234.4 to four digits are no margins.
        largest = max(abs(self.margin_in), abs(self.margin_out))
        digits = max(4, 3 + math.ceil(math.log10(largest / (self.margin_out - self.margin_in))))
        at = "" if self.temperature == 1 else f" loss.temperature={self.temperature:g}"
        return (
            f"loss.margins=fixed loss.margin_in={self.margin_in:.{digits}g} "
            f"loss.margin_out={self.margin_out:.{digits}g}{at}"
        )

    def margins(self) -> dict[str, tuple[float, float, float, float]]:
        """Of the proposal and of published margins: both, the ID share above the one, the outliers' below the other."""
        known = {"proposed": (self.margin_in, self.margin_out), **PUBLISHED}
        return {
            name: (*pair, *violations(self.id_energies, self.outlier_energies, *pair)) for name, pair in known.items()
        }

    def quantiles(self) -> dict[str, list[float]]:
        at = torch.tensor(QUANTILES, dtype=torch.float64)
        sides = {"id": self.id_energies, "outliers": self.outlier_energies}
        return {name: values.double().quantile(at).tolist() for name, values in sides.items()}

    def as_dict(self) -> dict[str, Any]:
        names = ("margin_in", "margin_out", "id_above", "outliers_below")
        return {
            "images": {"id": len(self.id_energies), "outliers": len(self.outlier_energies)},
            "quantiles": {"at": list(QUANTILES), **self.quantiles()},
            "auroc": self.auroc,
            "separate": self.separate,
            "margin_in": self.margin_in,
            "margin_out": self.margin_out,
            "temperature": self.temperature,
            "margins": {name: dict(zip(names, values, strict=True)) for name, values in self.margins().items()},
        }


def calibrate(
    model: Classifier, known: ImageSet, outliers: ImageSet, multi_label: bool, temperature: float = 1.0
) -> Calibration:
    """The Calibration of a model by two sets of images, ID and outliers, that it was not trained with.

    Raises ValueError where an energy is not finite.
    """
    name = "joint_energy" if multi_label else "energy"

    def energies(images: ImageSet) -> Tensor:
        found = as_score(name, scored(model, images, {}).logits, temperature).float()
        if not found.isfinite().all():
            raise ValueError(f"energies: expected finite numbers, got {int((~found.isfinite()).sum())} others")
        return found

    sides = energies(known), energies(outliers)
    return Calibration(*sides, *auto_margins(*sides), temperature)


def calibration_text(found: Calibration, checkpoint: str, figure: Path) -> str:
    """What was found, for a person."""
    head = ("energies", "images", *(f"{100 * at:.0f} %" for at in QUANTILES))
    sides = {"ID": found.id_energies, "outliers": found.outlier_energies}
    rows = [
        (name, f"{len(sides[name]):,}", *(f"{value:.2f}" for value in values))
        for name, values in zip(sides, found.quantiles().values(), strict=True)
    ]
    columns = ("margins", "margin_in", "ID above", "margin_out", "outliers below")
    lines = [
        (name, f"{low:.2f}", f"{above:.0%}", f"{high:.2f}", f"{below:.0%}")
        for name, (low, high, above, below) in found.margins().items()
    ]
    rule = (
        "margin_in is the lower quartile of the ID images' energies, margin_out the upper one of the outliers': a\n"
        "quarter of either side satisfies its hinge at the start, and the rest is pulled there."
    )
    if not found.separate:
        rule = (
            "This model's energies do not tell the two apart: the outliers' upper quartile is not above the ID\n"
            "images' lower one. The margins are about the middle of both medians, the interquartile range of the ID\n"
            "images apart, and no more than a beginning: look at the model, or at the outliers, first."
        )
    return (
        f"Energies of held-out images by the model of {checkpoint}; AUROC {100 * found.auroc:.1f}.\n\n"
        f"{aligned(head, rows, words=(0,))}\n\n{aligned(columns, lines, words=(0,))}\n\n{rule}\n"
        "Margins that nothing satisfies pull at every image for as long as training lasts, and ruin the accuracy;\n"
        "margins that everything satisfies do nothing.\n\n"
        f"  {found.words}\n\nThe histograms are in {figure}"
    )
