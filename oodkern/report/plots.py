"""The figures of a report: pairs of panels, each an SVG, that a page puts side by side or one below the other."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oodkern.metrics import cumulative_counts, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from oodkern.training import Run

# Okabe and Ito's palette, which colour-blind readers can tell apart. ID, then the OOD sets.
ID_COLOUR = "#0072b2"
OOD_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a00")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "oodkern",  # the same figure gives the same bytes
    "font.size": 10.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.labelcolor": "#333",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": "#555",
    "ytick.color": "#555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def panels(height: float = 3.3) -> tuple[list[Figure], list[Axes]]:
    """Two empty figures, and the axes of each."""
    # Without pyplot, which keeps figures alive and chooses a backend for the process.
    from matplotlib.figure import Figure

    figures = [Figure(figsize=(5.2, height), layout="constrained") for _ in range(2)]
    return figures, [figure.subplots() for figure in figures]


def as_svg(figures: list[Figure]) -> list[str]:
    drawn = []
    for figure in figures:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawn.append(buffer.getvalue())
    return drawn


def coloured(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    return {name: OOD_COLOURS[i % len(OOD_COLOURS)] for i, name in enumerate(names)}


def histograms(run: Run) -> list[str]:
    """The method's score on ID and OOD test images, before and after fine-tuning."""
    figures, axes = panels()
    for axis, one, when in zip(axes, (run.before, run.method), ("before", "after"), strict=True):
        scores = {name: to_numpy(values) for name, values in one.scores.items()}
        edges = bin_edges(np.concatenate(list(scores.values())))
        colours = {"id": ID_COLOUR} | coloured(one.ood)
        for name, values in scores.items():
            axis.hist(
                np.clip(values, edges[0], edges[-1]),
                edges.tolist(),
                weights=np.full(len(values), 100 / len(values)),
                histtype="stepfilled",
                facecolor=(colours[name], 0.4),
                edgecolor=colours[name],
                linewidth=1.4,
                label="ID" if name == "id" else name,
            )
        if when == "after":
            axis.axvline(run.threshold, color="#333", linestyle="--", linewidth=1.2, label="threshold")
        axis.set_title(f"{when} fine-tuning")
        axis.set_xlabel(f"{one.score_name} (larger = more OOD)")
        axis.set_ylabel("percent of the set's images")
        axis.legend()
    return as_svg(figures)


def bin_edges(values: NDArray, bins: int = 50) -> NDArray:
    """Equal bins over the middle 99 % of the values; what lies outside goes into the first and last bin."""
    low, high = np.quantile(values, [0.005, 0.995])
    if not low < high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def roc_points(id_scores: Any, ood_scores: Any) -> tuple[NDArray, NDArray]:
    """Shares of ID images flagged and of OOD images flagged, from the strictest threshold to the loosest."""
    found, flagged = cumulative_counts(to_numpy(ood_scores), to_numpy(id_scores))
    return np.append(0, flagged) / flagged[-1], np.append(0, found) / found[-1]


def roc_curves(run: Run) -> list[str]:
    """Both models on every OOD set; beside it the corner that decides, on a logarithmic axis."""
    figures, axes = panels(4.0)
    colours = coloured(run.method.ood)
    smallest = 0.5 / len(run.method.scores["id"])
    for one, style, model in ((run.before, ":", "before"), (run.method, "-", "after")):
        for name, found in one.ood.items():
            flagged, detected = roc_points(one.scores["id"], one.scores[name])
            label = f"{name} {model}: AUROC {100 * found.auroc:.1f}"
            axes[0].plot(flagged, detected, style, color=colours[name], linewidth=1.8, label=label)
            axes[1].plot(np.maximum(flagged, smallest), detected, style, color=colours[name], linewidth=1.8)
    for axis in axes:
        axis.axhline(0.95, color="#999", linewidth=0.8)
        axis.set_xlabel("ID images flagged (false positives)")
        axis.set_ylabel("OOD images detected")
        axis.set_ylim(-0.02, 1.02)
    axes[0].legend(loc="best")
    axes[1].set_xscale("log")
    axes[0].set_title("the whole curve")
    axes[1].set_title("the first percents, stretched")
    return as_svg(figures)


def training_curves(run: Run) -> list[str]:
    """Loss parts by epoch, and what the held-out training images say."""
    from matplotlib.ticker import MaxNLocator

    epochs = [line for line in run.history if "epoch" in line]
    stages = {"pretrain": "pretraining", run.config.method: f"{run.config.method} fine-tuning"}
    offset = max((line["epoch"] for line in epochs if line["stage"] == "pretrain"), default=0)
    figures, axes = panels()
    not_parts = {"stage", "epoch", "step", "lr", "images_per_second", "gradient_norm", "loss"}
    names = [
        name
        for name in dict.fromkeys(name for line in epochs for name in line)
        if name not in not_parts and not name.startswith(("validation_", "pool_"))
    ]
    series: Mapping[str, tuple[Axes, str]] = {
        **{name: (axes[0], name) for name in ("loss", *names)},
        "validation_accuracy": (axes[1], "mAP" if run.split.multi_label else "ID accuracy"),
        "validation_auroc": (axes[1], f"AUROC of {run.method.score_name}, held-out outliers"),
    }
    palette = (ID_COLOUR, *OOD_COLOURS)
    for position, (name, (axis, label)) in enumerate(series.items()):
        colour = palette[position % len(palette)]
        for stage, x0 in zip(stages, (0, offset), strict=True):
            points = [(x0 + line["epoch"], line[name]) for line in epochs if line["stage"] == stage and name in line]
            if points:
                x, y = zip(*points, strict=True)
                # A part that both stages have gets its line in each, and its name once.
                again = stage != "pretrain" and any(name in line for line in epochs if line["stage"] == "pretrain")
                axis.plot(x, y, ".-", color=colour, label=None if again else label, markersize=4, linewidth=1.4)
    for axis in axes:
        if offset and run.config.epochs:
            axis.axvline(offset + 0.5, color="#999", linewidth=0.8, linestyle="--")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("epoch (the dashed line: fine-tuning begins)" if offset else "epoch")
        if axis.has_data():
            axis.legend()
    positive = [value for line in axes[0].get_lines() for value in np.asarray(line.get_ydata(), float) if value > 0]
    if positive and max(positive) > 100 * min(positive):
        axes[0].set_yscale("log")
    axes[0].set_title("loss and its parts, on the training images")
    axes[1].set_title("on the validation images")
    return as_svg(figures)
