"""`energy`: energy fine-tuning, scored by the energy (multi-label: by JointEnergy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from oodkern._options import option
from oodkern.classifier import Output
from oodkern.losses import EnergyLoss
from oodkern.methods.base import Method, Setting, as_score, check_share
from oodkern.ops._checks import check_choice

# Which quantiles of the starting model's energies become margins. See `auto_margins`.
ID_QUANTILE, OUTLIER_QUANTILE = 0.25, 0.75
ABOVE = "validation_above_margin_in"
# With margins=auto three quarters of the ID images are above theirs at the start, and the hinges pull them down: a
# stage that ends with still more above it had a margin out of reach.
VIOLATION_WARNING = 0.9


@dataclass
class EnergyOptions:
    """Of the energy hinges."""

    alpha: float = option(0.1, "weight of both hinges")
    margins: str = option("auto", "auto: from the starting model's energies; fixed: the two numbers below")
    margin_in: float = option(-25.0, "ID energies above it are penalised")
    margin_out: float = option(-7.0, "outliers' energies below it are penalised")
    temperature: float = option(1.0, "of the energy")
    violation_warning: float = option(
        VIOLATION_WARNING, "share of held-out ID images above margin_in, at the end, that is told"
    )


def auto_margins(id_energies: Tensor, outlier_energies: Tensor) -> tuple[float, float]:
    """Margins from energies [N] and [M]: the ID's lower and the outliers' upper quartile.

    A quarter of either side then satisfies its hinge at the start, as with the published margins on the networks
    they were tuned for, and the rest is pulled there. Where the outliers' quartile is the lower one (a starting
    model whose energies do not separate them at all) the margins are set apart by the ID energies' interquartile
    range instead, about the midpoint of the medians.
    """
    margin_in = float(id_energies.float().quantile(ID_QUANTILE))
    margin_out = float(outlier_energies.float().quantile(OUTLIER_QUANTILE))
    if margin_in < margin_out:
        return margin_in, margin_out
    lower, median, upper = id_energies.float().quantile(id_energies.new_tensor([0.25, 0.5, 0.75]).float()).tolist()
    middle = (median + float(outlier_energies.float().median())) / 2
    apart = max(upper - lower, 1e-3)
    return middle - apart / 2, middle + apart / 2


def decide_margins(options: Any, id_energies: Tensor, outlier_energies: Tensor) -> dict[str, Any]:
    """The margins of options with `margins`, `margin_in` and `margin_out`, and the shares that satisfy them."""
    margin_in, margin_out = options.margin_in, options.margin_out
    if options.margins == "auto":
        margin_in, margin_out = auto_margins(id_energies, outlier_energies)
    return {
        "margins": options.margins,
        "margin_in": margin_in,
        "margin_out": margin_out,
        "id_inside": float((id_energies <= margin_in).float().mean()),
        "outliers_inside": float((outlier_energies >= margin_out).float().mean()),
    }


def violations(
    id_energies: Tensor, outlier_energies: Tensor, margin_in: float, margin_out: float
) -> tuple[float, float]:
    """The share of ID energies [N] above `margin_in`, and of outliers' [M] below `margin_out`: what the hinges pull."""
    return float((id_energies > margin_in).double().mean()), float((outlier_energies < margin_out).double().mean())


def margins_of(options: Any, decided: Mapping[str, Any]) -> tuple[float, float]:
    """Those that were decided, or else those of the options."""
    return decided.get("margin_in", options.margin_in), decided.get("margin_out", options.margin_out)


def watch_margins(margins: tuple[float, float], id_energies: Tensor, outlier_energies: Tensor) -> dict[str, float]:
    """What the log keeps of held-out images' energies."""
    above, below = violations(id_energies, outlier_energies, *margins)
    return {ABOVE: above, "validation_below_margin_out": below}


def margin_warning(options: Any, decided: Mapping[str, Any], watched: Mapping[str, float]) -> str:
    """In one line that more than `violation_warning` of the ID images violate their margin, or ""."""
    if watched.get(ABOVE, 0.0) <= options.violation_warning:
        return ""
    return (
        f"{watched[ABOVE]:.0%} of the held-out ID images have an energy above margin_in "
        f"({margins_of(options, decided)[0]:.2f}), more than loss.violation_warning: it is out of reach for this model"
    )


def describe_margins(decided: Mapping[str, Any]) -> str:
    return (
        f"margins ({decided['margins']}): ID energies under {decided['margin_in']:.2f} "
        f"({decided['id_inside']:.0%} are), outliers' over {decided['margin_out']:.2f} "
        f"({decided['outliers_inside']:.0%} are)"
    )


def check_margins(options: Any) -> None:
    check_choice(options.margins, "loss.margins", ("auto", "fixed"))
    if options.margins == "auto":
        check_left_alone(options, ("margin_in", "margin_out"), "loss.margins=fixed")
    check_share(options.violation_warning, "loss.violation_warning")


def check_left_alone(options: Any, names: Sequence[str], counts_with: str) -> None:
    """Raises ValueError where an option was given that has no effect without another one."""
    usual = type(options)()
    for name in names:
        if (given := getattr(options, name)) != getattr(usual, name):
            raise ValueError(f"loss.{name}: counts with {counts_with} alone, got {given} without it")


class Energy(Method):
    name = "energy"
    Options = EnergyOptions
    score_names = ("energy", "joint_energy")

    def __init__(self, options: EnergyOptions, multi_label: bool = False) -> None:
        super().__init__(options, multi_label)
        check_margins(options)

    def energy(self, logits: Tensor) -> Tensor:
        """What the margins speak of, and the score."""
        return as_score(self.score_name, logits, self.options.temperature)

    def score(self, outputs: Output, weight: Tensor) -> Tensor:
        return self.energy(outputs.logits)

    def decide(self, id_logits: Tensor, outlier_logits: Tensor) -> dict[str, Any]:
        return decide_margins(self.options, self.energy(id_logits), self.energy(outlier_logits))

    def watch(self, decided: Mapping[str, Any], id_logits: Tensor, outlier_logits: Tensor) -> dict[str, float]:
        margins = margins_of(self.options, decided)
        return watch_margins(margins, self.energy(id_logits), self.energy(outlier_logits))

    def warning(self, decided: Mapping[str, Any], watched: Mapping[str, float]) -> str:
        return margin_warning(self.options, decided, watched)

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        options = self.options
        margin_in, margin_out = margins_of(options, decided)
        return EnergyLoss(
            options.alpha,
            margin_in=margin_in,
            margin_out=margin_out,
            temperature=options.temperature,
            multi_label=self.multi_label,
        )

    def describe(self, decided: dict[str, Any]) -> str:
        return describe_margins(decided)
