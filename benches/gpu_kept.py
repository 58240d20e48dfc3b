"""A run on a GPU as a file, and its short table."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest_benchmark
from pytest_benchmark.stats import Stats
from pytest_benchmark.utils import get_commit_info
from runner import row_id
from stored import Group, new_path, read_run

from oodkern._files import write_json
from oodkern.benchmarks.case import COMPILED, Case
from oodkern.benchmarks.machine import commit


def entry(module: str, case: Case, contender: str, row: dict[str, Any], seconds: tuple[float, ...]) -> dict[str, Any]:
    """What pytest-benchmark stores of a test."""
    stats = Stats()
    for one in seconds:
        stats.update(one)
    ident = row_id(case, contender)
    return {
        "group": case.name,
        "name": f"test_gpu[{ident}]",
        "fullname": f"benches/{module}.py::test_gpu[{ident}]",
        "params": {"case": case.name, "name": contender},
        "param": ident,
        "extra_info": row,
        "options": {},
        "stats": stats.as_dict() | {"data": list(seconds), "iterations": 1},
    }


class Kept:
    """The run as pytest-benchmark stores one, and beside it under `suite` what else there is to tell."""

    def __init__(self, out: Path, revision: str | None, unread: dict[str, str], suite: dict[str, Any]):
        self.revision = revision or commit() or "no-commit"
        self.path = new_path(out, self.revision)
        about = get_commit_info()
        self.all: dict[str, Any] = {
            "machine_info": {},
            "commit_info": {key: about[key] for key in ("id", "time", "dirty") if key in about},
            "benchmarks": [],
            "datetime": datetime.now(timezone.utc).isoformat(),
            "version": pytest_benchmark.__version__,
            "suite": {**suite, "measured": 0, "failed": dict(unread), "broken": {}, "left_out": []},
        }
        if revision:
            self.all["commit_info"]["id"] = revision

    @property
    def suite(self) -> dict[str, Any]:
        return self.all["suite"]

    def add(self, module: str, case: Case, rows: list[tuple[str, dict[str, Any], tuple]], broken: list[str]) -> None:
        """A measured case, and what of its promises ours broke."""
        self.suite["measured"] += 1
        self.all["benchmarks"] += [entry(module, case, *row) for row in rows]
        if broken:
            self.suite["broken"][case.name] = "; ".join(broken)

    def save(self) -> None:
        write_json(self.path, self.all)


def ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or not ours else f"{theirs / ours:.2f}"


def line_of(group: Group, broken: dict[str, str]) -> str:
    ours, base, compiled = group.ours or group.any, group.base, group.rows.get(COMPILED)
    cells = (
        f"{ours.median * 1e3:.3f}",
        "-" if ours.roofline is None else f"{ours.roofline:.0%}",
        ratio(base and base.median, ours.median),
        ratio(compiled and compiled.median, ours.median),
        ratio(base and base.peak_bytes, ours.peak_bytes),
    )
    best = min((r for r in group.rivals if r not in (ours, base, compiled)), key=lambda one: one.median, default=None)
    rival = "-" if best is None else f"{ratio(best.median, ours.median)} {best.contender}"
    name = f"{ours.room}: {ours.title}".replace("×", "x")
    wrong = f"  WRONG: {broken[name]}" if name in broken else ""
    return "".join(f"{cell:>10}" for cell in cells) + f"  {rival}; {name}{wrong}"


def table(path: Path) -> list[str]:
    """Of a kept run a line a case: milliseconds of ours, percent of the roofline, how many times ours' time the base,
    torch.compile and the best other rival take, how many times ours' memory the base; what is wrong. Then what failed
    and what was left out."""
    suite = json.loads(path.read_text())["suite"]
    heads = ("ours, ms", "roofline", "eager", "compile", "memory")
    lines = ["".join(f"{head:>10}" for head in heads) + "  best other rival; case"]
    lines += [line_of(group, suite["broken"]) for group in read_run(path).groups]
    lines += [f"failed: {name}: {why}" for name, why in suite["failed"].items()]
    return lines + [f"left out: {name}" for name in suite["left_out"]]
