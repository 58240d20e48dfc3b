"""Outcomes as text."""

from __future__ import annotations

from oodkern.benchmarks.measure import Outcome

WIDTH = 24


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
        lines.append(line + f"  {1 / outcome.ratio(name):.2f} of {case.base}'s time")
    return lines + [f"  {name:<{WIDTH}} absent: {why}" for name, why in outcome.absent.items()]
