"""Runs as `pytest benches --benchmark-only --save` stores them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from oodkern.benchmarks.case import OURS


class Unreadable(ValueError):
    """A file or a folder that is not what was expected; says which."""


def is_ours(contender: str) -> bool:
    """Further contenders of ours have a word after the name: "oodkern, foreseen"."""
    return contender == OURS or contender.startswith(f"{OURS},")


def shape_of(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{name}={size:,}" for name, size in sizes.items())


@dataclass(frozen=True)
class Row:
    """One contender of a case: seconds, bytes, and the error that `as_row` stored. Of what is no case, such as a whole
    job, there may be no more than the first three, times and `more`."""

    room: str
    case: str
    contender: str
    file: str
    median: float
    q1: float
    q3: float
    rounds: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str = ""
    base: str = ""
    told: bool = False
    target: float | None = None
    why: str = ""
    error: float | None = None
    peak_bytes: int | None = None
    beyond_bytes: int | None = None
    flops: float = 0.0
    bytes: float = 0.0
    absent: Mapping[str, str] = field(default_factory=dict)
    roofline: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)
    """Further seconds and bytes, by names that end so."""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.case, shape_of(self.sizes), self.dtype)))

    @property
    def held(self) -> int | None:
        """Bytes beyond results; of what is no case those of the peak."""
        return self.beyond_bytes if self.base else self.peak_bytes


@dataclass(frozen=True)
class Growth:
    """One contender of a sweep: at each value seconds and, where they could be had, bytes."""

    room: str
    case: str
    dtype: str
    contender: str
    axis: str
    fixed: Mapping[str, int]
    values: list[int]
    median_seconds: list[float]
    quartile_seconds: list[list[float]]
    beyond_bytes: list[int] | None
    least_seconds: list[float]
    time_exponent: float
    memory_exponent: float | None
    promised: Mapping[str, float]
    file: str

    @property
    def sweep(self) -> str:
        fixed = f" at {shape_of(self.fixed)}" if self.fixed else ""
        return f"{self.room}: {self.case} against {self.axis}{fixed}, {self.dtype}"


@dataclass(frozen=True)
class Group:
    """The contenders of a case, in the order of the run."""

    rows: Mapping[str, Row]

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))

    @property
    def ours(self) -> Row | None:
        return self.rows.get(OURS)

    @property
    def base(self) -> Row | None:
        return self.rows.get(self.any.base)

    @property
    def rivals(self) -> list[Row]:
        """None in what is no case."""
        return [row for name, row in self.rows.items() if row.base and not is_ours(name)]


@dataclass(frozen=True)
class Run:
    path: Path
    sha256: str
    datetime: str
    machine: Mapping[str, Any]
    rows: list[Row]
    growth: list[Growth]
    suite: Mapping[str, Any]
    """What benches/gpu_suite.py tells beside rows; else empty."""

    @property
    def groups(self) -> list[Group]:
        found: dict[tuple[str, str], dict[str, Row]] = {}
        for row in self.rows:
            found.setdefault((row.room, row.title), {})[row.contender] = row
        return [Group(rows) for rows in found.values()]

    @property
    def sweeps(self) -> dict[str, list[Growth]]:
        found: dict[str, list[Growth]] = {}
        for one in self.growth:
            found.setdefault(one.sweep, []).append(one)
        return found


STATS = ("median", "q1", "q3", "rounds")


def read_run(path: Path) -> Run:
    """Benchmarks without a room are left out."""
    try:
        content = path.read_bytes()
        stored = json.loads(content)
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from None
    try:
        rows, growth = [], []
        for benchmark in stored["benchmarks"]:
            info, file = benchmark["extra_info"], benchmark["fullname"].split("::")[0]
            if "growth" in info:
                growth.append(_of(Growth, info | info["growth"] | {"file": file}))
            elif "room" in info:
                stats = {key: benchmark["stats"][key] for key in STATS}
                rows.append(_of(Row, info | stats | {"file": file, "more": _more(info)}))
        sha256 = hashlib.sha256(content).hexdigest()
        return Run(path, sha256, stored["datetime"], stored["machine_info"], rows, growth, stored.get("suite", {}))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise Unreadable(f"{path}: expected a run that `pytest benches --save` stored; {what}") from None


def _of(kind: type, stored: Mapping[str, Any]) -> Any:
    wanted = (one for one in fields(kind) if one.name in stored or one.default is one.default_factory is MISSING)
    return kind(**{one.name: stored[one.name] for one in wanted})


def _more(info: Mapping[str, Any]) -> dict[str, float]:
    known = {*(one.name for one in fields(Row)), "result_bytes", "least_seconds"}
    return {name: one for name, one in info.items() if name.endswith(("_seconds", "_bytes")) and name not in known}


def new_path(folder: Path, commit: str | None) -> Path:
    """DATE-COMMIT.json of today, with a number behind it where there is one: no earlier run is lost."""
    stem = f"{date.today().isoformat()}-{commit or 'no-commit'}"
    names = (f"{stem}{f'-{i}' if i > 1 else ''}.json" for i in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def newest_runs(folder: Path) -> dict[str, Run]:
    """Of each folder of a machine the newest run: by the date in its name, of one day by the time in it."""
    runs = {}
    for machine in sorted(path for path in folder.glob("*") if path.is_dir()):
        days: dict[str, list[Path]] = {}
        for path in sorted(machine.glob("*.json")):
            dated = re.match(r"\d{4}-\d\d-\d\d", path.name)
            if not dated:
                raise Unreadable(
                    f"{path}: expected a name that begins with the date of the run, as 2026-01-31-abc.json"
                )
            days.setdefault(dated[0], []).append(path)
        if days:
            newest = max(map(read_run, days[max(days)]), key=lambda run: run.datetime)
            if not newest.rows:
                raise Unreadable(f"{newest.path}: no case in it")
            runs[machine.name] = newest
    if not runs:
        raise Unreadable(
            f"{folder}: no runs in it; expected MACHINE/DATE-COMMIT.json, which `pytest benches --save` stores"
        )
    return runs
