"""Methods against plain training: the same splits, the same seeds, the same starting model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oodkern.config import ConfigError, TrainConfig, load_config, read_given
from oodkern.tables import aligned, percent
from oodkern.training.evaluation import Evaluation, best_of
from oodkern.training.folder import read_environment
from oodkern.training.launch import train
from oodkern.training.run import Run

BASELINE = "ce"
CONFIDENCE = 0.95
PRETRAINED = "pretrained"  # the folder, beside the runs, of the models that they start from
# Metric, and whether more of it is better.
METRICS = {"auroc": True, "aupr_out": True, "fpr95_ood_positive": False, "fpr95_id_positive": False}


@dataclass(frozen=True)
class Difference:
    """A mean difference from `ce`, with a confidence interval where there are two units or more."""

    mean: float
    low: float | None
    high: float | None
    better: int  # units in which the method is better
    units: int

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def paired(values: Sequence[float], baseline: Sequence[float], units: Sequence[Any], more: bool = True) -> Difference:
    """Of values and baseline [runs], paired; runs of one unit (a split) are averaged first.

    The interval is Student's over units: mean +- t(0.975, n - 1) s / sqrt(n). Units are what the conclusion is to hold
    for, so seeds of one split do not count as evidence about others.
    """
    from scipy.stats import t

    groups: dict[Any, list[float]] = {}
    for value, base, unit in zip(values, baseline, units, strict=True):
        groups.setdefault(unit, []).append(value - base)
    means = np.array([np.mean(group) for group in groups.values()])
    mean, n = float(means.mean()), len(means)
    better = int(((means > 0) if more else (means < 0)).sum())
    if n < 2:
        return Difference(mean, None, None, better, n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * means.std(ddof=1) / math.sqrt(n))
    return Difference(mean, mean - half, mean + half, better, n)


@dataclass
class Comparison:
    """The runs of every method on every (split, seed)."""

    methods: list[str]
    splits: list[int | None]
    seeds: list[int]
    runs: list[dict[str, Any]] = field(default_factory=list)
    data: str = ""  # the ID set
    multi_label: bool = False
    folder: Path = Path()  # of the runs

    def add(self, run: Run) -> None:
        # Plain training may be judged by either plain score, a method by its own.
        judged = run.plain if run.config.method == BASELINE else [run.method]
        self.runs.append(
            {
                "method": run.config.method,
                "split": run.config.data.split,
                "seed": run.config.seed,
                "accuracy": run.method.accuracy,
                "by_score": {one.score_name: metrics_of(one) for one in judged},
                "environment": read_environment(run.folder),
                "decided": run.decided,
            }
        )

    @property
    def unit(self) -> str:
        return "split" if len(self.splits) > 1 else "seed"

    @property
    def ood_sets(self) -> list[str]:
        return list(next(iter(self.runs[0]["by_score"].values())))

    def of(self, method: str) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["method"] == method]

    def score_of(self, method: str, ood: str) -> str:
        """The score with the higher mean AUROC over the runs; only `ce` has more than one, so it is in its favour."""
        runs = self.of(method)
        return max(runs[0]["by_score"], key=lambda name: np.mean([run["by_score"][name][ood]["auroc"] for run in runs]))

    def values(self, method: str, ood: str | None, metric: str) -> list[float]:
        runs = self.of(method)
        if ood is None:
            return [run[metric] for run in runs]
        score = self.score_of(method, ood)
        return [run["by_score"][score][ood][metric] for run in runs]

    def summary(self) -> list[dict[str, Any]]:
        """For each method, OOD set and metric: score, mean, and the paired Difference from `ce`."""
        units = [run[self.unit] for run in self.of(BASELINE)]
        rows = []
        for method in self.methods:
            asked = [(ood, metric, more) for ood in self.ood_sets for metric, more in METRICS.items()]
            for ood, metric, more in [*asked, (None, "accuracy", True)]:
                values = self.values(method, ood, metric)
                difference = paired(values, self.values(BASELINE, ood, metric), units, more)
                rows.append(
                    {
                        "method": method,
                        "ood": ood,
                        "score": None if ood is None else self.score_of(method, ood),
                        "metric": metric,
                        "mean": float(np.mean(values)),
                        "difference": None if method == BASELINE else difference.as_dict(),
                    }
                )
        return rows

    def as_dict(self, command: str) -> dict[str, Any]:
        return {
            "command": command,
            "data": self.data,
            "multi_label": self.multi_label,
            "methods": self.methods,
            "splits": self.splits,
            "seeds": self.seeds,
            "confidence": CONFIDENCE,
            "unit": self.unit,
            "summary": self.summary(),
            "runs": self.runs,
        }

    def table(self, metrics: Sequence[str] = tuple(METRICS)) -> str:
        """The summary for a person: of some metrics, and the accuracy."""
        names = {"auroc": "AUROC", "aupr_out": "AUPR", "fpr95_ood_positive": "FPR95", "fpr95_id_positive": "FPR95(ID+)"}
        head = ("method", "score", "OOD set", "metric", "mean", "minus ce", "95 % interval", "better in")
        rows = []
        for row in self.summary():
            if row["metric"] not in (*metrics, "accuracy"):
                continue
            found = row["difference"]
            shown = ("", "", "")
            if found:
                interval = "" if found["low"] is None else f"{signed(found['low'])} .. {signed(found['high'])}"
                shown = (signed(found["mean"]), interval, f"{found['better']} of {found['units']}")
            metric = names.get(row["metric"], "ID mAP" if self.multi_label else "ID accuracy")
            rows.append((row["method"], row["score"] or "", row["ood"] or "", metric, percent(row["mean"]), *shown))
        note = (
            f"In percent, over {len(self.splits)} split(s) and {len(self.seeds)} seed(s); lower FPR95 is better.\n"
            f"Differences are paired by split and seed; the interval is Student's over {self.unit}s. ce is judged on\n"
            "each OOD set by the plain score that serves it better there. An interval that holds 0 shows no difference."
        )
        return f"{aligned(head, rows, words=(0, 1, 2, 3))}\n\n{note}"


def signed(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "+0.0" if text == "-0.0" else text


def metrics_of(one: Evaluation) -> dict[str, dict[str, float]]:
    return {name: found.as_dict() for name, found in one.ood.items()}


def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    splits: Sequence[int | None],
    overrides: Sequence[str] = (),
    path: str | None = None,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Trains every method on every split and seed, `ce` too, in folders of `output` (runs/compare).

    Methods start from one model, which is pretrained once for each split and seed, and has the bits that each would
    have pretrained. Runs that are there already are taken as they are, or resumed, so that a comparison that was
    stopped goes on.

    Raises ConfigError before the first run where one of the configurations is wrong.
    """
    seeds = list(dict.fromkeys(seeds))
    methods = [BASELINE, *(method for method in dict.fromkeys(methods) if method != BASELINE)]
    for key in ("method", "seed", "name", "data.split"):
        if any(one.split("=")[0] == key for one in overrides):
            raise ConfigError(f"{key}: compare sets it for each run; expected other keys")
    if "output" not in read_given(path, overrides):
        overrides = [*overrides, "output=runs/compare"]
    configs = [
        load_config(path, [*overrides, *options(method, seed, split)])
        for split in splits
        for seed in seeds
        for method in methods
    ]
    data = list(dict.fromkeys(config.data.name for config in configs))
    if len(data) > 1:
        own = " and ".join(data)
        raise ConfigError(f"data.name: methods have {own} as their own data, expected one for all; give data.name=...")
    folder = Path(configs[0].output)
    comparison = Comparison(methods, list(splits), list(seeds), [], data[0], configs[0].multi_label, folder)
    for number, config in enumerate(configs, 1):
        pretrained = folder / PRETRAINED / f"{replace(config, method=BASELINE, name='').folder.name}.ckpt"
        run = train(config, log=lambda line: None, resume=True, report=False, pretrained=pretrained)
        comparison.add(run)
        log(f"{number} of {len(configs)}: {describe(run, config)}")
    return comparison


def options(method: str, seed: int, split: int | None) -> list[str]:
    return [f"method={method}", f"seed={seed}", f"data.split={'null' if split is None else split}", "name=''"]


def describe(run: Run, config: TrainConfig) -> str:
    one = best_of(run.plain) if config.method == BASELINE else run.method
    aurocs = ", ".join(f"{name} {percent(found.auroc)}" for name, found in one.ood.items())
    return f"{config.folder.name}: AUROC {aurocs} by {one.score_name}; ID {percent(one.accuracy)} ({run.seconds:.1f} s)"
