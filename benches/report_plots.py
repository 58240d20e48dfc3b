"""Plots of how time and memory grow."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benches.stored import Growth, Run, is_ours
from oodkern.benchmarks.case import COMPILED, OURS
from oodkern.benchmarks.growth import FLOOR_BYTES
from oodkern.report.plots import ID_COLOUR, OOD_COLOURS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN, SERIES = "oodkern-run", "oodkern-series"  # keys of a plot's metadata
INCHES, DPI = (9.0, 3.9), 150
ONE_LINE = 62  # characters of labels beside each other
COLOURS = 64  # of the palette: files stay small
ASIDE = 1.04  # from one contender's points to the next one's, so that what is equal is seen, and bars stand apart
# Colour and marker of each contender, the same in every plot.
LOOKS = {
    OURS: (ID_COLOUR, "o"),
    "eager": (OOD_COLOURS[0], "s"),
    COMPILED: (OOD_COLOURS[1], "D"),
    "chunked": (OOD_COLOURS[2], "v"),
    "published": (OOD_COLOURS[5], "^"),
}
FURTHER_OURS = ((OOD_COLOURS[4], "P"), ("#332288", "X"))
FURTHER = ((OOD_COLOURS[3], "P"), ("#666666", "X"), ("#882255", "<"), ("#117733", ">"))
CEILING, CEILING_COLOUR = "copy/product ceiling", "#333333"
Looks = dict[str, tuple[str, str]]


def plot_name(machine: str, sweep: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{machine} {sweep.replace(',', '')}".lower()).strip("-") + ".png"


def looks(contenders: Iterable[str]) -> Looks:
    found = dict(LOOKS)
    for ours, some in ((True, FURTHER_OURS), (False, FURTHER)):
        further = [name for name in contenders if name not in LOOKS and is_ours(name) == ours]
        found |= zip(further, itertools.cycle(some))
    return found


def style(contender: str, look: tuple[str, str]) -> dict[str, Any]:
    ours = is_ours(contender)
    emphasis = (
        {"linewidth": 2.4, "markersize": 7, "zorder": 7 if contender == OURS else 6}
        if ours
        else {"linewidth": 1.5, "markersize": 5.5}
    )
    return {"label": contender, "color": look[0], "marker": look[1], "zorder": 4} | emphasis


def places(values: Sequence[int], index: int, count: int) -> list[float]:
    return [value * ASIDE ** (index - (count - 1) / 2) for value in values]


def draw_time(axes: Axes, sweep: Sequence[Growth], found: Looks) -> None:
    for i, one in enumerate(sweep):
        medians = [1e3 * seconds for seconds in one.median_seconds]
        below = [median - 1e3 * low for median, (low, _) in zip(medians, one.quartile_seconds, strict=True)]
        above = [1e3 * high - median for median, (_, high) in zip(medians, one.quartile_seconds, strict=True)]
        bars = {"yerr": (below, above), "capsize": 2.5, "elinewidth": 1.1}
        axes.errorbar(places(one.values, i, len(sweep)), medians, **bars, **style(one.contender, found[one.contender]))
    if any(sweep[0].least_seconds):
        least = [1e3 * seconds for seconds in sweep[0].least_seconds]
        axes.plot(sweep[0].values, least, "--", color=CEILING_COLOUR, linewidth=1.3, zorder=5, label=CEILING)
    axes.set_title("time of a call, ms", loc="left")


def draw_memory(axes: Axes, sweep: Sequence[Growth], found: Looks) -> None:
    axes.set_title("memory beyond results, MB", loc="left")
    floor = FLOOR_BYTES / 1e6
    for i, one in enumerate(sweep):
        if one.beyond_bytes:
            held = [max(bytes / 1e6, floor) for bytes in one.beyond_bytes]
            axes.plot(places(one.values, i, len(sweep)), held, **style(one.contender, found[one.contender]))
    if not axes.lines:
        axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#777")
        return
    axes.set_ylim(0.5 * floor, max(axes.get_ylim()[1], 10.0))
    axes.axhspan(0.1 * floor, floor, color="#f0f0f0", zorder=0)
    note = "up to 1 MiB: the allocator's noise"
    axes.annotate(note, (0.99, 0.015), xycoords="axes fraction", ha="right", color="#777", fontsize=8)


def ticks(axes: Axes, one: Growth) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xticks(one.values, [f"{value:,}" for value in one.values])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel(one.axis)


def draw(sweep: Sequence[Growth]) -> bytes:
    """A PNG: time with quartiles, and memory beyond results."""
    import matplotlib
    from matplotlib.figure import Figure

    found = looks([one.contender for one in sweep])
    with matplotlib.rc_context({**STYLE, "font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        time, memory = figure.subplots(1, 2, subplot_kw={"xscale": "log", "yscale": "log"})
        draw_time(time, sweep, found)
        draw_memory(memory, sweep, found)
        for axes in (time, memory):
            ticks(axes, sweep[0])
        figure.suptitle(sweep[0].sweep, x=0.01, ha="left", fontsize=11.5)
        handles, labels = time.get_legend_handles_labels()
        if CEILING in labels:  # which the axes name first, goes last
            handles, labels = handles[1:] + handles[:1], labels[1:] + labels[:1]
        columns = len(labels) if sum(map(len, labels)) <= ONE_LINE else 4
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plot(run: Run, sweep: Sequence[Growth]) -> bytes:
    """With the SHA-256 of its run and the names of its series in the metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in marks(run, sweep).items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(draw(sweep))).convert("RGB")
    image.quantize(COLOURS).save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def marks(run: Run, sweep: Iterable[Growth]) -> dict[str, str]:
    return {RUN: run.sha256, SERIES: "; ".join(one.contender for one in sweep)}


def plot_difference(path: Path, expected: dict[str, str]) -> str | None:
    """Why the file is not the plot of that run and those series; pixels depend on fonts and are not compared."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            found = {key: image.info.get(key) for key in expected}
    except FileNotFoundError:
        return "missing"
    except UnidentifiedImageError:
        return "no picture"
    different = [f"{key} is {found[key]}, expected {text}" for key, text in expected.items() if found[key] != text]
    return "; ".join(different) or None
