"""Makes docs/performance.md, its plots and the tables of README.md of the newest run of each machine."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benches import report_tables as tables
from benches.report_plots import marks, plot, plot_difference, plot_name
from benches.stored import Group, Growth, Run, Unreadable, newest_runs
from oodkern._files import write_bytes, write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOTS, README = Path("docs/performance.md"), Path("docs/plots"), Path("README.md")
BLOCK = re.compile(r"(<!-- benchmarks: (\S+) -->\n)((?:(?!<!-- benchmarks).)*?)(<!-- /benchmarks -->)", re.DOTALL)
LINES = 12  # of what differs
EXAMPLE = """example:
  pytest benches --benchmark-only --save   # a quarter of an hour
  python -m benches.report                 # writes what these numbers say
  python -m benches.report --check         # exit code 1 where what is written says something else"""
METHOD = """# Performance

Made by `python -m benches.report` of the newest run of each machine in `benches/results`; `--check` tells whether it
still is.

How this is measured:

- Contenders take turns on the same random inputs: one after the other, then all again in another order, so that a
  machine that slows down does so for all, and nobody always finds the caches that the same one left. The first call,
  which compiles, loads and allocates, does not count. A turn of a short call has several of it. Times are medians of
  the turns, quartiles in brackets; on a GPU by events on the stream, after a write that empties its L2 cache.
  "× ours" is how many times our median another one takes.
- Memory is the peak of one call less what was held before it: on a CPU VmHWM of a fresh process that has done the call
  before, on a GPU the allocator's. "MB" is what is held beyond results, which all contenders have to hold.
- Upstream gradients are random numbers, one a row; where a mean of rows is differentiated one for all, and of whole
  losses 1,024, as a loss scale is. Who is "told the upstream" knows it beforehand, as autograd does not.
- "error" is the largest difference from the same in float64, in units of the largest magnitude there.
- "roofline" is the least time that the case can take, as a share of ours: of moving its inputs and results once, as
  fast as a large copy does, and computing its matrix products, as fast as large square ones, the longer; both measured
  in the same run. What stays in caches can be beyond 100 %.
- "published" is written as the papers' released code has it, where that is another thing than "eager", which is PyTorch
  as one would write it with care; "torch.compile" is that, compiled; "chunked" takes some rows at a time.
"""


def machine_words(run: Run) -> str:
    found = run.machine
    return found["gpu"] if found["device"] == "cuda" else f"{found['cpu']}, {found['cores']} cores"


def on_machine(run: Run) -> str:
    versions = f"PyTorch {run.machine['versions']['torch']}, commit {run.machine['commit']}, {run.datetime[:10]}"
    return f"{machine_words(run)} ({versions}; [every row](docs/performance.md))"


def about(run: Run, machine: str) -> str:
    found = run.machine
    cpu = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['capability']}"
    gpu = f"{found['gpu']}, {found['memory_bytes'] / 1e9:.0f} GB, CUDA {found['cuda']}; " if "gpu" in found else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    run_file = f"`benches/results/{machine}/{run.path.name}` (SHA-256 `{run.sha256}`)"
    return (
        f"{gpu}{cpu}; Python {found['python']}, {versions}; commit {found['commit']}, {run.datetime[:10]}; {run_file}."
    )


def room_parts(run: Run, groups: Sequence[Group]) -> Iterator[str]:
    """A table of ours beside each rival, one of cases where none is ours, one of what is no case; then every contender
    of the cases on a line of its own."""
    room = groups[0].any.room
    yield f"### {room}"
    cases = [group for group in groups if group.any.base]
    for made, some in (
        (tables.wide, [group for group in cases if group.ours]),
        (tables.beside_base, [group for group in cases if not group.ours]),
        (tables.jobs, [group for group in groups if not group.any.base]),
    ):
        if some:
            yield tables.with_command(made(some), some, run)
    if not cases:
        return
    yield f"<details><summary>{room}: a line a contender</summary>"
    for group in cases:
        yield tables.with_command(f"{group.any.title}:\n\n{tables.long(group)}", [group], run)
    yield "</details>"


def growth_parts(run: Run, machine: str) -> Iterator[str]:
    yield "### Growth"
    yield (
        "Exponents p of size^p: of time over the last decade of sizes, of memory beyond results over all, where up to"
        " 1 MiB is noise; 1 is linear, 0 flat. In the plots bars are quartiles, and points of one size stand a little"
        " aside so that all are seen."
    )
    yield tables.exponents(run.growth) + "\n\n" + tables.command(run.growth, run, " -k growth")
    for name in run.sweeps:
        yield f"![{name}](plots/{plot_name(machine, name)})"


def page(runs: Mapping[str, Run]) -> str:
    parts = [METHOD.rstrip()]
    for machine, run in runs.items():
        groups = run.groups
        parts += [f"## {machine_words(run)}", about(run, machine)]
        for title, found, nothing in (
            ("Where a rival is faster", tables.faster_rivals(groups), "Nowhere in this run."),
            ("Where a rival holds less memory", tables.leaner_rivals(groups), "Nowhere, by more than 1 MB."),
            ("Targets missed", tables.missed_targets(groups), "None."),
            ("Who is absent", tables.absent(run.rows), "Nobody."),
        ):
            parts += [f"### {title}", "\n".join(found) or nothing]
        if undone := tables.left_undone(run):
            parts += ["### Failed, wrong or left out", "\n".join(undone)]
        rooms: dict[str, list[Group]] = {}
        for group in groups:
            rooms.setdefault(group.any.room, []).append(group)
        for some in rooms.values():
            parts += room_parts(run, some)
        if run.growth:
            parts += growth_parts(run, machine)
    return "\n\n".join(parts) + "\n"


def readme(text: str, runs: Mapping[str, Run]) -> str:
    """With its blocks of these runs."""
    found = [match[2] for match in BLOCK.finditer(text)]
    for opened in re.findall(r"<!-- benchmarks: (.*?) -->", text):
        if opened not in tables.MAKERS:
            raise Unreadable(f"{README}: benchmarks: {opened}: expected one of {', '.join(tables.MAKERS)}")
        if opened not in found:
            raise Unreadable(f"{README}: benchmarks: {opened}: no <!-- /benchmarks --> after it")
    described = [(run, on_machine(run)) for run in runs.values()]
    return BLOCK.sub(lambda match: f"{match[1]}{tables.block(match[2], described)}\n{match[4]}", text)


def texts(runs: Mapping[str, Run], root: Path) -> dict[Path, str]:
    made = {PAGE: page(runs)}
    if (root / README).exists():
        made[README] = readme((root / README).read_text(), runs)
    return made


def plots(runs: Mapping[str, Run]) -> dict[Path, tuple[Run, list[Growth]]]:
    return {
        PLOTS / plot_name(machine, name): (run, sweep)
        for machine, run in runs.items()
        for name, sweep in run.sweeps.items()
    }


def superfluous(wanted: Mapping[Path, object], root: Path) -> list[Path]:
    return [path for path in sorted((root / PLOTS).glob("*.png")) if path.relative_to(root) not in wanted]


def write(runs: Mapping[str, Run], root: Path) -> None:
    made, drawn = texts(runs, root), plots(runs)
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    for path, (run, sweep) in drawn.items():
        write_bytes(root / path, plot(run, sweep))
    for path in superfluous(drawn, root):
        path.unlink()
    for path, text in made.items():
        write_text(root / path, text)


def differences(runs: Mapping[str, Run], root: Path) -> list[str]:
    """What is written and is not what these runs say: a line with the name of each, and some lines of a diff."""
    found = []
    for path, text in texts(runs, root).items():
        there = (root / path).read_text() if (root / path).exists() else ""
        if there != text:
            diff = list(
                difflib.unified_diff(there.splitlines(), text.splitlines(), "written", "of the runs", "", "", 0, "")
            )
            found += [f"{path}: differs from the runs", *diff[:LINES]]
            found += [f"... {len(diff) - LINES} lines more"] if len(diff) > LINES else []
    drawn = plots(runs)
    for path, (run, sweep) in drawn.items():
        if why := plot_difference(root / path, marks(run, sweep)):
            found.append(f"{path}: {why}")
    return found + [f"{path.relative_to(root)}: of no run" for path in superfluous(drawn, root)]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benches.report",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = root / "benches" / "results"
    parser.add_argument(
        "results", nargs="?", type=Path, default=default, metavar="RESULTS_FOLDER", help="benches/results"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; print what differs")
    options = parser.parse_args(arguments)
    try:
        runs = newest_runs(options.results)
        different = differences(runs, root) if options.check else write(runs, root)
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(different or []), end="\n" if different else "")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
