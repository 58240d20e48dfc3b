"""The figures of a comparison: differences with intervals, every unit, and what AUROC cost in accuracy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from oodkern.report import plots
from oodkern.tables import evaluation_head
from oodkern.training.comparison import BASELINE, METRICS, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"auroc": "AUROC", "fpr95_ood_positive": "FPR95", "fpr95_id_positive": "FPR95(ID+)"}
PLAIN = "#444444"  # the colour of ce
# Of a difference: colour, marker, face. Told apart without colours too.
VERDICTS = {"better": ("#009e73", "o", "#009e73"), "worse": ("#d55e00", "s", "#d55e00"), "": ("#777777", "o", "white")}


def printable(value: Any) -> str:
    """One line of characters that HTML and XML allow."""
    text = re.sub(r"[\t\n\r]+", " ", str(value))
    return re.sub("[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def quality(comparison: Comparison) -> str:
    return evaluation_head(comparison.multi_label)[2]


def verdict(difference: Mapping[str, Any] | None, more: bool) -> str:
    """better or worse where the interval excludes 0, otherwise nothing."""
    if not difference or difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "better" if (difference["low"] > 0) == more else "worse"


def indexed(comparison: Comparison) -> dict[tuple[str, str | None, str], dict[str, Any]]:
    return {(row["method"], row["ood"], row["metric"]): row for row in comparison.summary()}


def differences(comparison: Comparison, metrics: tuple[str, str]) -> list[str]:
    """For each OOD set a panel for each metric, on a scale of its own: sets can be a hundredfold apart."""
    drawn = []
    for ood in comparison.ood_sets:
        figures, axes = plots.panels(1.0 + 0.27 * len(comparison.methods))
        for axis, metric in zip(axes, metrics, strict=True):
            forest(axis, comparison, ood, metric)
        drawn += plots.as_svg(figures)
    return drawn


def every_unit(comparison: Comparison) -> list[str]:
    """A panel for each OOD set."""
    return each_set(comparison, by_unit, 1.2 + 0.36 * len(comparison.methods))


def trade_offs(comparison: Comparison) -> list[str]:
    """A panel for each OOD set."""
    return each_set(comparison, trade_off, 3.5)


def each_set(comparison: Comparison, draw: Callable[[Axes, Comparison, str], None], height: float) -> list[str]:
    """A panel for each OOD set."""
    made: list[Figure] = []
    for start in range(0, len(comparison.ood_sets), 2):
        pair, axes = plots.panels(height)
        for figure, axis, ood in zip(pair, axes, comparison.ood_sets[start : start + 2], strict=False):
            draw(axis, comparison, ood)
            made.append(figure)
    return plots.as_svg(made)


def short(name: str, length: int = 30) -> str:
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def coloured(methods: Iterable[str]) -> dict[str, str]:
    palette = cycle((plots.ID_COLOUR, *plots.OOD_COLOURS))
    return {method: PLAIN if method == BASELINE else next(palette) for method in methods}


def forest(axis: Axes, comparison: Comparison, ood: str, metric: str) -> None:
    """The methods' differences from ce with their intervals, one below the other."""
    rows, rivals = indexed(comparison), [method for method in comparison.methods if method != BASELINE]
    for y, method in enumerate(rivals):
        found = rows[method, ood, metric]["difference"]
        colour, marker, face = VERDICTS[verdict(found, METRICS[metric])]
        if found["low"] is not None:
            axis.plot([100 * found["low"], 100 * found["high"]], [y, y], color=colour, linewidth=1.8)
        axis.plot(100 * found["mean"], y, marker, color=colour, markerfacecolor=face, markersize=7)
    axis.axvline(0, color="#333", linewidth=1)
    by_method(axis, rivals)
    side = "right" if METRICS[metric] else "left"
    axis.set_xlabel(f"percentage points from {BASELINE} (better to the {side})")
    axis.locator_params(axis="x", nbins=7)
    axis.set_title(f"{short(ood)}: {NAMES[metric]}")


def by_method(axis: Axes, methods: Sequence[str]) -> None:
    """The methods from top to bottom."""
    axis.set_yticks(range(len(methods)), methods)
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)


def by_unit(axis: Axes, comparison: Comparison, ood: str) -> None:
    """The AUROC of every method on every unit; lines join the same unit."""
    units = [run[comparison.unit] for run in comparison.of(BASELINE)]
    values = np.array(  # [methods, units], the runs of a unit averaged
        [
            [np.mean([v for v, u in zip(of, units, strict=True) if u == unit]) for unit in dict.fromkeys(units)]
            for of in (comparison.values(method, ood, "auroc") for method in comparison.methods)
        ]
    )
    rows = np.arange(len(values))
    axis.plot(100 * values, rows, color="#bbb", linewidth=0.7, alpha=0.7, zorder=1)
    for row, colour in enumerate(coloured(comparison.methods).values()):
        axis.plot(100 * values[row], np.full(values.shape[1], row), "o", color=colour, alpha=0.55, markersize=5.5)
        axis.plot(100 * values[row].mean(), row, "|", color=colour, markersize=17, markeredgewidth=2.6)
    by_method(axis, comparison.methods)
    axis.set_xlabel("AUROC, percent")
    axis.set_title(short(ood))


def trade_off(axis: Axes, comparison: Comparison, ood: str) -> None:
    """The mean accuracy of every method against its mean AUROC."""
    rows, colours = indexed(comparison), coloured(comparison.methods)
    points = {
        m: (100 * rows[m, None, "accuracy"]["mean"], 100 * rows[m, ood, "auroc"]["mean"]) for m in comparison.methods
    }
    axis.axvline(points[BASELINE][0], color="#999", linewidth=0.8, linestyle="--")
    axis.axhline(points[BASELINE][1], color="#999", linewidth=0.8, linestyle="--")
    for method, point in points.items():
        axis.plot(*point, "D" if method == BASELINE else "o", color=colours[method], markersize=7.5)
    along_x, along_y = zip(*points.values(), strict=True)
    axis.set_xlim(bounds(along_x))
    axis.set_ylim(bounds(along_y))
    axis.set_xlabel(f"{quality(comparison)}, percent")
    axis.set_ylabel("AUROC, percent")
    axis.set_title(short(ood))
    label(axis, points, colours)


def bounds(values: Sequence[float], least: float = 1.0) -> tuple[float, float]:
    """Of an axis: room around the values, and never so short that a thousandth of a percent looks like much."""
    low, high = min(values), max(values)
    spare = max(0.16 * (high - low), (least - (high - low)) / 2)
    return low - spare, high + spare


def label(axis: Axes, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """A name beside each point, where it covers the least of the other names and points."""
    figure: Any = axis.figure
    figure.draw_without_rendering()  # which lays the axes out
    scale, room = figure.dpi / 72, axis.get_window_extent()
    places = {name: axis.transData.transform(point) for name, point in points.items()}
    taken = [(*(place - 5 * scale), *(place + 5 * scale)) for place in places.values()]
    around = [(x, y) for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))]
    for name, (x, y) in places.items():
        measured = axis.text(0, 0, name, fontsize=9.5)
        extent = measured.get_window_extent()
        measured.remove()
        best: Any = None
        for gap in (8, 18, 30):
            for right, up in around:
                # The name's centre, from the point, in pixels.
                dx = right * (gap * scale + extent.width / 2)
                dy = up * (gap * scale + extent.height / 2)
                box = (x + dx - extent.width / 2, y + dy - extent.height / 2,
                       x + dx + extent.width / 2, y + dy + extent.height / 2)  # fmt: skip
                inside = room.x0 <= box[0] and room.y0 <= box[1] and box[2] <= room.x1 and box[3] <= room.y1
                cost = sum(common(box, other) for other in taken) + (0 if inside else 1e6)
                if best is None or cost < best[0]:
                    best = (cost, dx, dy, box, gap)
        _, dx, dy, box, gap = best
        taken.append(box)
        arrow: Any = {"arrowstyle": "-", "color": "#999", "linewidth": 0.7, "shrinkB": 4} if gap > 8 else None
        axis.annotate(
            name, points[name], (dx / scale, dy / scale), textcoords="offset points", arrowprops=arrow,
            ha="center", va="center", fontsize=9.5, color=colours[name],
        ).set_in_layout(False)  # fmt: skip


def common(one: Sequence[float], other: Sequence[float]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    return max(width, 0) * max(min(one[3], other[3]) - max(one[1], other[1]), 0)
