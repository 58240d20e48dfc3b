import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "tests")]

from measure import Row, machine  # noqa: E402

ROWS: list[Row] = []


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, default=15, help="timed turns of each contender (the median counts)")
    parser.addoption("--save", metavar="NAME", help="write benches/results/NAME.json")


@pytest.fixture(scope="session")
def rounds(request) -> int:
    return request.config.getoption("--rounds")


@pytest.fixture
def record(benchmark):
    """Keeps a row for the table and puts its numbers into pytest-benchmark's report."""

    def keep(row: Row) -> None:
        ROWS.append(row)
        benchmark.extra_info.update(asdict(row), ratio=row.ratio)

    return keep


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write("side by side: medians in ms; the most held at once in MB, and without results; error against float64 of the")
    write("same inputs")
    write(", ".join(f"{key} {value}" for key, value in machine().items()))
    for row in ROWS:
        shape = "x".join(f"{size:,}" for size in row.shape)
        goal = f", aimed for {row.target:g}" if row.target else ""
        faster = "" if row.ratio is None else f": {row.ratio:.2f} times faster than {row.base}{goal}"
        write(f"\n{row.room}: {row.case} {shape} {row.dtype}{faster}")
        for name, median in row.milliseconds.items():
            line = f"  {name:<14} {median:9.2f} ms {row.megabytes[name]:9.1f} MB"
            if row.beyond:
                line += f", {row.beyond[name]:9.1f} without results"
            if name in row.error:
                line += f"   error {row.error[name]:.1e}"
            if row.ratio is None:
                time, memory = (of[name] / of[row.base] for of in (row.milliseconds, row.megabytes))
                line += f"   {time:5.2f} times the time and {memory:5.2f} times the memory of {row.base}"
            write(line)
        for name, why in row.skipped.items():
            write(f"  {name:<14} skipped: {why}")
    if name := config.getoption("--save"):
        path = ROOT / "benches" / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        rows = [asdict(row) | {"ratio": row.ratio} for row in ROWS]
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
        write(f"\nwritten to {path.relative_to(ROOT)}")
