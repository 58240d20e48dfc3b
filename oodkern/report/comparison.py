"""The page of a comparison: every method beside plain training, with intervals. No script, no request to anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from oodkern.report import comparison_plots, plots
from oodkern.report.comparison_plots import NAMES, indexed, printable, quality, short, verdict
from oodkern.report.page import data_uri, document
from oodkern.tables import percent
from oodkern.training import files
from oodkern.training.comparison import BASELINE, CONFIDENCE, METRICS, Comparison, signed


def write_comparison(comparison: Comparison, path: Path, command: str) -> Path:
    """Writes the page to `path`, and returns that.

    `command` is what made the runs, and is shown as it is given. Means and differences are those of
    `comparison.summary()`; a difference is marked where its interval excludes 0.
    """
    import matplotlib

    # Names of OOD sets are words, not formulas; and a font without their characters is the browser's concern.
    with matplotlib.rc_context({**plots.STYLE, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Glyph|Matplotlib currently does not support)")
        content = page(comparison, command)
    files.write_text(path, content)
    return path


def page(comparison: Comparison, command: str) -> str:
    rivals = [method for method in comparison.methods if method != BASELINE]
    title = f"{', '.join(rivals)} against {BASELINE}" if rivals else f"{BASELINE} alone"
    parts = [header(comparison, title, command), matrix(comparison), figures(comparison), facts(comparison)]
    body = "\n".join(parts)
    return document(printable(title), body)


def safe(value: Any) -> str:
    return escape(printable(value))


def header(comparison: Comparison, title: str, command: str) -> str:
    units = len({run[comparison.unit] for run in comparison.runs})
    intervals = f"over {units} {comparison.unit}s" if units > 1 else f"none, there is one {comparison.unit} only"
    items = {
        "methods": ", ".join(comparison.methods),
        "data set": comparison.data,
        "splits": f"{len(comparison.splits)} ({listed(comparison.splits)})",
        "seeds": f"{len(comparison.seeds)} ({listed(comparison.seeds)})",
        "interval": intervals,
    }
    told = "".join(f"<li>{name} <b>{safe(value)}</b></li>" for name, value in items.items() if value)
    return (
        f"<header><h1>{safe(title)}</h1><ul class='facts'>{told}</ul>"
        f"<pre class='command'>{safe(command)}</pre></header>"
    )


def listed(numbers: Sequence[int | None]) -> str:
    """0 to 14 where they are consecutive, otherwise each."""
    known = [number for number in numbers if number is not None]
    if len(known) > 2 and known == list(range(known[0], known[0] + len(known))):
        return f"{known[0]} to {known[-1]}"
    return ", ".join(map(str, known)) or "the fixed one"


def matrix(comparison: Comparison) -> str:
    """A row for each method: ID accuracy, and for each OOD set the metrics that are shown."""
    rows = indexed(comparison)
    groups = "".join(
        f"<th class='set' colspan='{len(NAMES)}' scope='colgroup'>{safe(o)}</th>" for o in comparison.ood_sets
    )
    names = "".join(
        f"<th class='number{' set' if i == 0 else ''}' scope='col'>{name}</th>"
        for _ in comparison.ood_sets
        for i, name in enumerate(NAMES.values())
    )
    lines = []
    for method in comparison.methods:
        cells = [cell(rows[method, None, "accuracy"], False)]
        cells += [cell(rows[method, ood, m], m == "auroc") for ood in comparison.ood_sets for m in NAMES]
        scores = {ood: rows[method, ood, "auroc"]["score"] for ood in comparison.ood_sets}
        if len(set(scores.values())) == 1:
            judged = f"by {next(iter(scores.values()))}"
        else:
            judged = "by " + ", ".join(f"{score} ({short(ood)})" for ood, score in scores.items())
        kind = " class='plain'" if method == BASELINE else ""
        first = f"<th scope='row'>{safe(method)}<small>{safe(judged)}</small></th>"
        lines.append(f"<tr{kind}>{first}{''.join(cells)}</tr>")
    note = (
        "In percent, the mean over all runs; higher is better but for the FPRs. Below it the difference from "
        f"{BASELINE}, paired by split and seed, and its {100 * CONFIDENCE:.0f} % interval over {comparison.unit}s. "
        "Better and worse: the interval excludes 0. FPR95: ID images flagged where 95 % of OOD images are; FPR95(ID+): "
        f"OOD images accepted where 95 % of ID images are. {BASELINE} is judged on each OOD set by the plain score "
        "that serves it better there."
    )
    accuracy = f"<th rowspan='2' class='number' scope='col'>{quality(comparison)}</th>"
    return (
        f"<section><h2>Summary</h2><div class='scroll'><table class='matrix'><thead>"
        f"<tr><th rowspan='2' scope='col'>method</th>{accuracy}{groups}</tr><tr>{names}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div><p class='note'>{safe(note)}</p></section>"
    )


def cell(row: Mapping[str, Any], first: bool) -> str:
    """The mean; the difference and what it shows; the interval."""
    found, below = row["difference"], ""
    if found:
        mark = verdict(found, METRICS.get(row["metric"], True))
        shown = f"<em class='{mark}'>{mark}</em> " if mark else ""
        below = f"<small>{shown}{signed(found['mean'])}</small>"
    if found and found["low"] is not None:
        below += f"<small class='interval'>{signed(found['low'])} .. {signed(found['high'])}</small>"
    return f"<td class='number{' set' if first else ''}'><b>{percent(row['mean'])}</b>{below}</td>"


def figures(comparison: Comparison) -> str:
    sets, unit = [printable(ood) for ood in comparison.ood_sets], comparison.unit
    metrics = ("auroc", "fpr95_ood_positive")
    averaged = ", its seeds averaged" if unit == "split" and len(comparison.seeds) > 1 else ""
    drawn = [
        (
            f"Every {unit}",
            comparison_plots.every_unit(comparison),
            [f"AUROC of every method on every {unit}, OOD set {ood}" for ood in sets],
            f"A dot is a {unit}{averaged}, a grey line joins its dots, a bar is the mean.",
        )
    ]
    if len(comparison.methods) > 1:
        forests = (
            f"Differences from {BASELINE}",
            comparison_plots.differences(comparison, metrics),
            [f"{NAMES[m]} of every method minus {BASELINE}'s, OOD set {ood}" for ood in sets for m in metrics],
            f"Mean differences, and their {100 * CONFIDENCE:.0f} % intervals where there are two {unit}s or more. "
            "Green dots: better; orange squares: worse; hollow dots: no difference shown.",
        )
        trades = (
            "Accuracy against AUROC",
            comparison_plots.trade_offs(comparison),
            [f"Mean {quality(comparison)} and mean AUROC of every method, OOD set {ood}" for ood in sets],
            f"Means over all runs. The dashed lines meet at {BASELINE}: up and to the right of it is better in both.",
        )
        drawn = [forests, *drawn, trades]
    sections = []
    for name, panels, descriptions, note in drawn:
        images = "".join(
            f"<img class='figure' alt='{safe(alt)}' src='{data_uri(svg.encode(), 'image/svg+xml')}'>"
            for svg, alt in zip(panels, descriptions, strict=True)
        )
        kind = "figures" if len(panels) > 1 else "figures one"
        shown = f"<div class='{kind}'>{images}</div><p class='note'>{safe(note)}</p>"
        sections.append(f"<section><h2>{safe(name)}</h2>{shown}</section>")
    return "\n".join(sections)


def fact(value: Any) -> str:
    """none, a number to four digits, or the text of it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


def facts(comparison: Comparison) -> str:
    """The table of the terminal, every run, and what they ran on."""
    known = [{**run.get("environment", {})} for run in comparison.runs]
    names = list(dict.fromkeys(name for one in known for name in one))
    same = [name for name in names if all(one.get(name) == known[0].get(name) for one in known)]
    shared = "".join(f"<li>{safe(name)} <b>{safe(fact(known[0].get(name)))}</b></li>" for name in same)
    decided = [run["decided"] for run in comparison.runs]
    differing = [{name: value for name, value in one.items() if name not in same} for one in known]
    extra = [own | one for own, one in zip(decided, differing, strict=True)]
    columns = list(dict.fromkeys(name for one in extra for name in one))
    numbers = (quality(comparison), *(f"AUROC {ood}" for ood in comparison.ood_sets))
    heads = "".join(f"<th>{safe(name)}</th>" for name in ("method", "split", "seed"))
    heads += "".join(f"<th class='number'>{safe(name)}</th>" for name in (*numbers, *columns))
    lines = []
    for run, one in zip(comparison.runs, extra, strict=True):
        judged = {ood: run["by_score"][comparison.score_of(run["method"], ood)][ood] for ood in comparison.ood_sets}
        found = [run["accuracy"], *(metrics["auroc"] for metrics in judged.values())]
        words = (run["method"], "fixed" if run["split"] is None else run["split"], run["seed"])
        line = "".join(f"<td>{safe(word)}</td>" for word in words)
        texts = [*map(percent, found), *(fact(one[name]) if name in one else "" for name in columns)]
        line += "".join(f"<td class='number'>{safe(text)}</td>" for text in texts)
        lines.append(f"<tr>{line}</tr>")
    table = "\n".join(map(printable, comparison.table().split("\n")))
    return (
        f"<section><h2>Details</h2><ul class='facts environment'>{shared}</ul>"
        f"<details><summary>The table that the terminal prints</summary><pre>{escape(table)}</pre></details>"
        f"<details><summary>Every run ({len(comparison.runs)})</summary><div class='scroll'><table class='compact'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details></section>"
    )
