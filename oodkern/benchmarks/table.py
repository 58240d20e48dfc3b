"""Outcomes as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oodkern.benchmarks.case import COMPILED, OURS, Case
from oodkern.benchmarks.measure import Found, Outcome
from oodkern.tables import aligned

WIDTH = 24
RIVALS = ("eager", COMPILED, "chunked", "published")
HEAD = ("case", "shape", "dtype", "ours, ms", *RIVALS, "MB", "error")
LEGEND = (
    "ours, ms: median [quartiles], contenders in turns; of a rival how many times as long it takes: 1.00 is a tie.\n"
    "MB held at most beyond inputs and results, and largest error against float64, of the largest number: ours / eager."
)


def outcome_lines(outcome: Outcome) -> list[str]:
    """A case and a line a contender: median and quartiles, memory, error, how many times ours is faster; then who was
    absent."""
    case = outcome.case
    lines = [f"\n{case.name}" + ("" if case.target is None else f" (aimed for {case.target:g} times {case.base})")]
    for name, found in outcome.found.items():
        low, high = found.times.quartiles
        line = f"  {name:<{WIDTH}} {found.times.median * 1e3:10.3f} ms  [{low * 1e3:.3f}, {high * 1e3:.3f}]"
        if found.peak is not None:
            line += f"  {found.peak.bytes / 1e6:9.1f} MB, {found.peak.beyond / 1e6:9.1f} beyond results"
        if found.error is not None:
            line += f"  error {found.error:.1e}"
        lines.append(
            line + (f"  {1 / outcome.ratio(name):.2f} of {case.base}'s time" if case.base in outcome.found else "")
        )
    return lines + [f"  {name:<{WIDTH}} absent: {why}" for name, why in outcome.absent.items()]


def outcomes_text(outcomes: Sequence[Outcome], found: dict[str, Any]) -> str:
    """A line a case; then what else was measured, where a rival was faster, who was absent, and on which machine."""
    parts = [aligned(HEAD, [_row(one) for one in outcomes], words=(0, 1, 2)), LEGEND]
    if others := _others(outcomes):
        parts.append("\n".join(["Also measured, in times of ours:", *others]))
    faster = _faster(outcomes)
    parts.append("\n".join(["Rivals that were faster:", *faster]) if faster else "No rival was faster in these cases.")
    if absent := _absent(outcomes):
        parts.append("\n".join(["Absent:", *absent]))
    return "\n\n".join([*parts, machine_line(found)])


def machine_line(found: dict[str, Any]) -> str:
    """Of `machine`: who computed, with which versions, of which commit."""
    who = f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread(s), {found['capability']}"
    if found["device"] == "cuda":
        who = f"{found['gpu']}, CUDA {found['cuda']}; {who}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    commit = found["commit"] or "not of a checkout"
    return f"{who}\nPython {found['python']}, {versions}; oodkern {found['oodkern']}, commit {commit}"


def _row(outcome: Outcome) -> list[str]:
    case, ours, base = outcome.case, outcome.found[OURS], outcome.found.get(outcome.case.base)
    low, high = ours.times.quartiles
    return [
        _title(case),
        case.shape.replace(" x ", " "),
        case.dtype,
        f"{_digits(ours.times.median * 1e3)} [{_digits(low * 1e3)}, {_digits(high * 1e3)}]",
        *(f"{_times(outcome, name):.2f}" if name in outcome.found else "-" for name in RIVALS),
        " / ".join("-" if not one or one.peak is None else f"{one.peak.beyond / 1e6:.1f}" for one in (ours, base)),
        " / ".join("-" if not one or one.error is None else f"{one.error:.0e}" for one in (ours, base)),
    ]


def _title(case: Case) -> str:
    return case.title if case.room in case.title else f"{case.room}: {case.title}"


def _digits(number: float) -> str:
    """Three of them."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}" if number >= 1 else f"{number:.3f}"


def _times(outcome: Outcome, name: str) -> float:
    """How many times as long as ours a contender takes."""
    return 1 / outcome.ratio(name, OURS)


def _others(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for one in outcomes:
        names = [name for name in one.found if name not in (OURS, *RIVALS)]
        if names:
            lines.append(f"  {place(one.case)}: " + ", ".join(f"{name} {_times(one, name):.2f}" for name in names))
    return lines


def _faster(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for one in outcomes:
        ours = one.found[OURS]
        for name, found in one.found.items():
            if not name.startswith(OURS) and found.times.median < ours.times.median:
                overlap = ", though quartiles overlap" if _overlap(ours, found) else ""
                lines.append(f"  {place(one.case)}: {name} takes {_times(one, name):.2f} of our time{overlap}")
    return lines


def _overlap(one: Found, other: Found) -> bool:
    (low, high), (lower, higher) = one.times.quartiles, other.times.quartiles
    return low <= higher and lower <= high


def place(case: Case) -> str:
    return f"{_title(case)}, {case.shape}, {case.dtype}"


def _absent(outcomes: Sequence[Outcome]) -> list[str]:
    """Who, why, and in how many of the cases."""
    count: dict[tuple[str, str], int] = {}
    for one in outcomes:
        for pair in one.absent.items():
            count[pair] = count.get(pair, 0) + 1
    return [f"  {name}, in {number} of {len(outcomes)}: {why}" for (name, why), number in count.items()]
