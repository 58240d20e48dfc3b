"""What a selection took of a pool: quantiles of its scores, and a figure of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oodkern.report.plots import ID_COLOUR, OOD_COLOURS, STYLE, as_svg, bin_edges
from oodkern.tables import aligned

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SAMPLE = (
    2**24
)  # scores in memory at once, 64 MiB: of more, as many evenly spaced ones have the quantiles to four digits
BINS = 60


def sampled(scores: NDArray) -> NDArray:
    """The finite ones of the scores, or of `SAMPLE` of them evenly spaced."""
    some = np.asarray(scores[:: max(-(-len(scores) // SAMPLE), 1)])
    return some[np.isfinite(some)]


def quantiles(scores: NDArray) -> list[float | None]:
    some = sampled(scores)
    return np.quantile(some, QUANTILES).tolist() if len(some) else [None] * len(QUANTILES)


def selection_record(pool: NDArray, chosen: NDArray) -> dict[str, Any]:
    """Numbers and quantiles of the scores of a pool [N] and of what was chosen [n], as plain values."""
    sides = {"pool": pool, "chosen": chosen}
    return {name: {"rows": len(one), "quantiles": quantiles(one)} for name, one in sides.items()} | {"at": [*QUANTILES]}


def selection_table(record: Mapping[str, Any], score: str) -> str:
    head = (score, "rows", *(f"{100 * at:.0f} %" for at in QUANTILES))
    rows = [
        (
            name,
            f"{record[name]['rows']:,}",
            *("" if value is None else f"{value:.4g}" for value in record[name]["quantiles"]),
        )
        for name in ("pool", "chosen")
    ]
    return aligned(head, rows, words=(0,))


def edges_of(scores: NDArray) -> NDArray:
    """Equal bins over all scores; where a few lie far out over the middle ones, and those in the first and last."""
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 0.0)
    middle = bin_edges(scores, BINS) if len(scores) else np.linspace(-0.5, 0.5, BINS + 1)
    if not low < high or high - low > 3 * (middle[-1] - middle[0]):
        return middle
    return np.linspace(low, high, BINS + 1)


def selection_figure(pool: NDArray, chosen: NDArray, policy: str, score: str) -> str:
    """An SVG of the scores of a pool [N] and, below, of what a policy chose of it [n]: rows a bin, in the same bins.

    Each has a scale of its own, since thousands are chosen of millions; what is chosen of a bin lies below it.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges = edges_of(np.concatenate([sampled(pool), sampled(chosen)]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        panels = figure.subplots(2, sharex=True)
        sides = (("pool", pool, ID_COLOUR), ("taken", chosen, OOD_COLOURS[0]))
        for axes, (name, values, colour) in zip(panels, sides, strict=True):
            counts = np.zeros(BINS, np.int64)
            for start in range(0, len(values), SAMPLE):
                some = np.asarray(values[start : start + SAMPLE])
                counts += np.histogram(np.clip(some[np.isfinite(some)], edges[0], edges[-1]), edges)[0]
            face = (*matplotlib.colors.to_rgb(colour), 0.45)
            label = f"{name}: {len(values):,} images"
            axes.stairs(counts, edges, fill=True, facecolor=face, edgecolor=colour, linewidth=1.2, label=label)
            axes.set_ylabel("images a bin")
            axes.set_ylim(0, max(1.08 * counts.max(), 1))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.legend(loc="best")
        panels[0].set_title(f"the pool, and what {policy} took of it")
        panels[1].set_xlabel(f"{score} (low: in-distribution)" if score == "energy" else score)
        (drawn,) = as_svg([figure])
    return drawn
