"""What became slower, faster, larger or smaller between two runs of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.report_tables import megabytes, milliseconds
from benches.stored import Row, Run, Unreadable, is_ours, read_run

SHARE = 0.10
BYTES = 1e6
EXAMPLE = """example:
  python -m benches.compare benches/results/amd-epyc-2-cores/2026-01-10-abc1234.json \\
                            benches/results/amd-epyc-2-cores/2026-02-01-def5678.json

A time counts as changed where its median did by more than 10 % and the quartiles do not meet; memory beyond results
where it did by more than 10 % and 1 MB. Rows are those of cases; growth is not compared.
exit code: 1 where ours became slower or larger, 2 where a file cannot be read, else 0."""
Key = tuple[Any, ...]


def rows_of(run: Run) -> dict[Key, Row]:
    return {(row.room, row.case, tuple(row.sizes.items()), row.dtype, row.contender): row for row in run.rows}


def name_of(row: Row) -> str:
    return f"{row.room}: {row.title}: {row.contender}"


def time_change(old: Row, new: Row) -> str | None:
    """ "slower", "faster" or None."""
    change = new.median / old.median - 1
    if change > SHARE and new.q1 > old.q3:
        return "slower"
    if change < -SHARE and new.q3 < old.q1:
        return "faster"
    return None


def memory_change(old: Row, new: Row) -> str | None:
    """ "larger", "smaller" or None."""
    if old.held is None or new.held is None:
        return None
    change = new.held - old.held
    if abs(change) <= max(BYTES, SHARE * old.held):
        return None
    return "larger" if change > 0 else "smaller"


def machine_differences(old: Run, new: Run) -> list[str]:
    keys = dict.fromkeys([*old.machine, *new.machine])
    pairs = ((key, old.machine.get(key), new.machine.get(key)) for key in keys if key != "commit")
    return [f"{key}: {before} / {after}" for key, before, after in pairs if before != after]


def compare(old: Run, new: Run) -> tuple[list[str], bool]:
    """The lines to print, and whether ours became slower or larger."""
    before, after = rows_of(old), rows_of(new)
    changed: dict[str, list[str]] = {kind: [] for kind in ("slower", "faster", "larger", "smaller")}
    worse = False
    both = [key for key in before if key in after]
    for key in both:
        a, b = before[key], after[key]
        time, memory = time_change(a, b), memory_change(a, b)
        if time:
            span = f"{milliseconds(a.median)} -> {milliseconds(b.median)} ms, {b.median / a.median:.2f} of it"
            changed[time].append(f"{name_of(a)}: {span}")
        if memory:
            changed[memory].append(f"{name_of(a)}: {megabytes(a.held)} -> {megabytes(b.held)} MB")
        worse |= is_ours(a.contender) and (time == "slower" or memory == "larger")
    lines = []
    if different := machine_differences(old, new):
        lines = ["The machines differ, so this is no comparison of code:", *(f"  {one}" for one in different)]
    only = {
        f"only in {run.path}": [name_of(row) for key, row in mine.items() if key not in theirs]
        for run, mine, theirs in ((old, before, after), (new, after, before))
    }
    for kind, found in (changed | only).items():
        if found:
            lines += [f"{kind}:", *(f"  {one}" for one in found)]
    return [*lines, f"{len(both)} rows in both; ours {'became' if worse else 'did not become'} slower or larger"], worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benches.compare",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "old", type=Path, metavar="OLD", help="a run that `pytest benches --benchmark-only --save` stored"
    )
    parser.add_argument("new", type=Path, metavar="NEW", help="a later one")
    options = parser.parse_args(arguments)
    try:
        lines, worse = compare(read_run(options.old), read_run(options.new))
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
