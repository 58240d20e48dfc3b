"""`separation`: outlier features off the directions of the class weights; scored by MSP and alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from oodkern._options import option
from oodkern.classifier import Output
from oodkern.losses import EnergyLoss, OutlierExposureLoss, SeparationLoss
from oodkern.methods.base import Method, Setting, as_score, check_share
from oodkern.methods.energy import (
    VIOLATION_WARNING,
    check_left_alone,
    check_margins,
    decide_margins,
    describe_margins,
    margin_warning,
    margins_of,
    watch_margins,
)
from oodkern.methods.objective import Batch, Loss, Objective, Rows, parted
from oodkern.ops import alignment
from oodkern.ops._checks import check_choice, check_non_negative

OUTLIER_LOSSES, SCORE_REDUCTIONS = ("oe", "energy"), ("mean", "sum")


@dataclass
class SeparationOptions:
    """Of the directions of features, beside a loss of the logits."""

    alpha: float = option(1.0, "weight of the ID features' cosine to their own class weight")
    beta: float = option(1.0, "weight of the outliers' cosines to all class weights")
    sep_reduction: str = option("auto", "of those over the classes: mean, sum (K times larger), auto: sum below 1,000")
    separation: str = option("cosine", "cosine; projection: the share of a feature in the span of the class weights")
    rank: int = option(0, "of the projection: the leading directions of the span; 0: all of it")
    refresh: int = option(100, "steps after which the projection follows the class weights")
    start: float = option(0.0, "share of the training after which both terms count; 0: the starting model is trained")
    outlier_loss: str = option("oe", "of the outliers' logits: oe or energy")
    weight: float = option(0.0, "of that; 0: 0.5 for oe, 0.1 for the hinges of energy")
    margins: str = option("auto", "of energy: auto, from the starting model's energies; fixed: the two numbers below")
    margin_in: float = option(-25.0, "ID energies above it are penalised")
    margin_out: float = option(-7.0, "outliers' energies below it are penalised")
    violation_warning: float = option(
        VIOLATION_WARNING, "of energy: share of held-out ID images above margin_in, at the end, that is told"
    )
    score_reduction: str = option(
        "mean", "of the score's alignment over the classes: mean, or sum as the released code"
    )


class Separation(Method):
    name = "separation"
    Options = SeparationOptions
    score_names = ("msp+alignment", None)

    def __init__(self, options: SeparationOptions, multi_label: bool = False) -> None:
        super().__init__(options, multi_label)
        check_share(options.start, "loss.start")
        check_choice(options.outlier_loss, "loss.outlier_loss", OUTLIER_LOSSES)
        if options.outlier_loss == "oe":
            check_left_alone(
                options, ("margins", "margin_in", "margin_out", "violation_warning"), "loss.outlier_loss=energy"
            )
        check_margins(options)
        check_non_negative(options.weight, "loss.weight")
        if options.separation == "projection" and options.sep_reduction != "auto":
            raise ValueError(f"loss.sep_reduction: a projection sums over no classes; got {options.sep_reduction}")
        check_choice(options.score_reduction, "loss.score_reduction", SCORE_REDUCTIONS)

    def score(self, outputs: Output, weight: Tensor) -> Tensor:
        """-(max_c softmax_c + mean_c |cos(x, w_c)|)."""
        aligned = alignment(outputs.features, weight.to(outputs.features.dtype))
        times = len(weight) if self.options.score_reduction == "sum" else 1
        return as_score("msp", outputs.logits) - times * aligned

    def decide(self, id_logits: Tensor, outlier_logits: Tensor) -> dict[str, Any]:
        if self.options.outlier_loss == "oe":
            return {}
        return decide_margins(self.options, as_score("energy", id_logits), as_score("energy", outlier_logits))

    def watch(self, decided: Mapping[str, Any], id_logits: Tensor, outlier_logits: Tensor) -> dict[str, float]:
        if self.options.outlier_loss == "oe":
            return {}
        margins = margins_of(self.options, decided)
        return watch_margins(margins, as_score("energy", id_logits), as_score("energy", outlier_logits))

    def warning(self, decided: Mapping[str, Any], watched: Mapping[str, float]) -> str:
        return margin_warning(self.options, decided, watched)

    def describe(self, decided: dict[str, Any]) -> str:
        return describe_margins(decided)

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        options = self.options
        outlier_loss: OutlierExposureLoss | EnergyLoss = OutlierExposureLoss(options.weight or 0.5)
        if options.outlier_loss == "energy":
            outlier_loss = EnergyLoss(options.weight or 0.1, *margins_of(options, decided))
        return SeparationLoss(
            options.alpha,
            options.beta,
            options.sep_reduction,
            outlier_loss,
            options.separation,
            options.rank or None,
            options.refresh,
        )

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        return SeparationObjective(self.build_loss(decided, setting), self.options)


class SeparationObjective(Objective):
    def __init__(self, loss: nn.Module, options: SeparationOptions) -> None:
        super().__init__(loss)
        self.options = options

    def begin(self, progress: float) -> None:
        on = progress >= self.options.start
        self.loss.alpha, self.loss.beta = (self.options.alpha, self.options.beta) if on else (0.0, 0.0)

    def rows(self, model: Any, images: Tensor) -> Rows:
        return (model.features(images),) if self.fused else tuple(model.outputs(images))

    def loss_of(self, model: Any, rows: Rows, batch: Batch) -> Loss:
        self.loss.calls = batch.step  # `refresh` is in steps, and a step in parts has two calls
        if self.fused:
            return self.loss_of_features(model, rows[0], batch)
        (logits, more_logits), (features, more_features) = (parted(one, len(batch.target)) for one in rows)
        arguments = (features, model.head.weight, logits, batch.target, more_features, more_logits)
        return self.loss(*arguments, return_parts=True, **batch.of_whole)
