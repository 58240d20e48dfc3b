"""Tables of stored runs, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benches.stored import Group, Growth, Row, Run, shape_of
from oodkern.benchmarks.case import COMPILED, OURS

NO_RUN = "No run in benches/results has these."
NOISE_BYTES = 1e6  # a rival that holds less holds so much less


def significant(value: float) -> str:
    """Three digits."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}" if value >= 0.1 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return significant(seconds * 1e3)


def megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:,.{0 if count >= 9.95e6 else 1}f}"


def quartiles(row: Row) -> str:
    return f"[{milliseconds(row.q1)}, {milliseconds(row.q3)}]"


def times(row: Row, of: Row | None) -> str:
    return "" if of is None else significant(row.median / of.median)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> str:
    """The first columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def command(rows: Iterable[Row | Growth], run: Run, only: str = "") -> str:
    """What gives them."""
    if run.suite:
        return f"`python benches/gpu_suite.py --out DIR --rooms {','.join(sorted({row.room for row in rows}))}`"
    return f"`pytest {' '.join(sorted({row.file for row in rows}))} --benchmark-only{only}`"


def rows_of(groups: Iterable[Group]) -> list[Row]:
    return [row for group in groups for row in group.rows.values()]


def with_command(made: str, groups: Sequence[Group], run: Run) -> str:
    return f"{made}\n\n{command(rows_of(groups), run)}"


def wide(groups: Sequence[Group], brief: bool = False) -> str:
    """A line a case: ours, and how many times its time and what memory each other one takes."""
    others = list(dict.fromkeys(name for group in groups for name in group.rows if name != OURS))
    header = ["case", "shape", "dtype", "oodkern, ms", "MB"]
    header += [] if brief else ["error", "roofline"]
    header += [f"{name}, × ours / MB" for name in others]
    lines = []
    for group in groups:
        ours = group.rows[OURS]
        line = [ours.case, shape_of(ours.sizes), ours.dtype, f"{milliseconds(ours.median)} {quartiles(ours)}"]
        line.append(megabytes(ours.held))
        if not brief:
            line.append("" if ours.error is None else f"{ours.error:.1e}")
            line.append("" if ours.roofline is None else f"{100 * ours.roofline:.0f} %")
        for name in others:
            row = group.rows.get(name)
            found = [] if row is None else [times(row, ours), megabytes(row.held)]
            line.append(" / ".join(filter(None, found)))
        lines.append(line)
    return table(header, lines, 3)


def beside_base(groups: Sequence[Group]) -> str:
    """A line a contender, of cases where none is ours: time and memory beside the base's."""
    lines = []
    for group in groups:
        base = group.base
        for name, row in group.rows.items():
            more = ""
            if base is not None and base.beyond_bytes and row.beyond_bytes is not None:
                more = significant(row.beyond_bytes / base.beyond_bytes)
            time = f"{milliseconds(row.median)} {quartiles(row)}"
            lines.append([name, row.case, time, times(row, base), megabytes(row.held), more])
    bases = " or ".join(dict.fromkeys(group.any.base for group in groups))
    header = ["", "case", "ms", f"× {bases}", "MB", f"× {bases}"]
    return table(header, lines, 2)


def long(group: Group) -> str:
    """A line a contender of one case."""
    header = ["", "median, ms", "quartiles", "turns", "MB at the peak", "MB beyond results", "error", "× base"]
    lines = []
    for name, row in group.rows.items():
        error = "" if row.error is None else f"{row.error:.1e}"
        memory = [megabytes(row.peak_bytes), megabytes(row.beyond_bytes)]
        label = f"{name} (base)" if name == row.base else name
        time = [milliseconds(row.median), quartiles(row), str(row.rounds)]
        lines.append([label, *time, *memory, error, times(row, group.base)])
    return table(header, lines, 1)


def jobs(groups: Sequence[Group]) -> str:
    lines = []
    for group in groups:
        for name, row in group.rows.items():
            spread = f" [{significant(row.q1)}, {significant(row.q3)}]" if row.rounds > 1 else ""
            line = [row.case, name, significant(row.median) + spread, megabytes(row.held)]
            lines.append([*line, ", ".join(further(key, value) for key, value in row.more.items())])
    return table(["job", "", "seconds", "MB at the peak", "beside"], lines, 2)


def further(name: str, value: float) -> str:
    words = name.replace("_", " ")
    if name.endswith("_bytes"):
        return f"{words.removesuffix(' bytes')} {megabytes(value)} MB"
    return f"{words.removesuffix(' seconds')} {significant(value)} s"


def telling(groups: Iterable[Group]) -> list[Group]:
    """Of each room and dtype the case of most work: operations, then bytes; the first of equals."""
    found: dict[tuple[str, str], Group] = {}
    for group in groups:
        one = group.any
        best = found.setdefault((one.room, one.dtype), group).any
        if (one.flops, one.bytes) > (best.flops, best.bytes):
            found[one.room, one.dtype] = group
    return list(found.values())


def rooms(groups: Sequence[Group]) -> str:
    header = ["room", "case", "shape", "dtype", "oodkern, ms", "× eager", f"× {COMPILED}", "× fastest other"]
    lines = []
    for group in groups:
        ours = group.rows[OURS]
        eager = group.rows.get("eager", group.base)
        fastest = min(group.rivals, key=lambda row: row.median, default=None)
        line = [ours.room, ours.case, shape_of(ours.sizes), ours.dtype, milliseconds(ours.median)]
        label = "" if eager is None or eager.contender in ("eager", OURS) else f" ({eager.contender})"
        compiled = group.rows.get(COMPILED)
        line.append("" if eager is None or eager is ours else times(eager, ours) + label)
        line.append("" if compiled is None else times(compiled, ours))
        line.append("" if fastest is None else f"{times(fastest, ours)} ({fastest.contender})")
        memory = [megabytes(row.held) for row in (ours, eager) if row is not None]
        lines.append([*line, " / ".join(filter(None, memory))])
    return table([*header, "MB: oodkern / eager"], lines, 4)


def block_of(group: Group) -> str:
    """The block of the README that a case belongs to: its room's own, or that of all rooms."""
    return group.any.room if group.any.room in MAKERS else "rooms"


MAKERS: dict[str, Callable[[Sequence[Group]], str]] = {
    "rooms": lambda groups: rooms(telling(group for group in groups if group.ours)),
    "methods": beside_base,
    "greg": lambda groups: wide([group for group in groups if group.ours], brief=True),
    "pool": lambda groups: wide([group for group in groups if group.ours], brief=True),
    "jobs": jobs,
}


def block(name: str, runs: Iterable[tuple[Run, str]]) -> str:
    """A block of the README, of runs and the words for their machines."""
    parts = []
    for run, on in runs:
        groups = [group for group in run.groups if block_of(group) == name and (group.any.base or name == "jobs")]
        if not groups:
            continue
        made = MAKERS[name](groups)
        source = "`pytest benches --benchmark-only`" if name == "rooms" else command(rows_of(groups), run)
        parts.append(f"{on}:\n\n{made}\n\n{source}")
    return "\n\n".join(parts) or NO_RUN


def faster_rivals(groups: Iterable[Group]) -> list[str]:
    found = []
    for group in groups:
        for row in group.rivals:
            ours = group.ours
            if ours is None or row.median >= ours.median:
                continue
            spans = (
                f"{milliseconds(row.median)} ms {quartiles(row)} against {milliseconds(ours.median)} {quartiles(ours)}"
            )
            sure = "" if row.q3 < ours.q1 else "; the quartiles meet"
            factor = significant(ours.median / row.median)
            who = f"{row.contender}, told the upstream," if row.told else row.contender
            found.append(f"- {row.room}: {row.title}: {who} is {factor} times as fast ({spans}{sure})")
        found += reasons(group, found)
    return found


def reasons(group: Group, lines: Sequence[str]) -> list[str]:
    """Why, behind the lines of a group that have anything to be explained."""
    ours = group.ours
    said = ours is not None and ours.why and lines and f": {ours.title}: " in lines[-1]
    return [f"  ({ours.why})"] if said and ours is not None else []


def leaner_rivals(groups: Iterable[Group]) -> list[str]:
    found = []
    for group in groups:
        for row in group.rivals:
            ours = group.ours
            if ours is None or ours.beyond_bytes is None or row.beyond_bytes is None:
                continue
            if ours.beyond_bytes - row.beyond_bytes > NOISE_BYTES:
                amounts = f"{megabytes(row.held)} MB against {megabytes(ours.held)}"
                found.append(f"- {row.room}: {row.title}: {row.contender} holds {amounts}")
    return found


def missed_targets(groups: Iterable[Group]) -> list[str]:
    found = []
    for group in groups:
        ours, base = group.ours, group.base
        if ours is None or base is None or ours.target is None:
            continue
        reached = base.median / ours.median
        if reached < ours.target:
            aim = f"{ours.target:g} times as fast as {base.contender}"
            found.append(f"- {ours.room}: {ours.title}: aimed for {aim}, reached {significant(reached)}")
            found += reasons(group, found)
    return found


def absent(rows: Iterable[Row]) -> list[str]:
    """Each third party and reason once, with the rooms that miss it."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for name, reason in row.absent.items():
            found.setdefault((name, reason), {})[row.room] = None
    return [f"- {name}: {reason} ({', '.join(rooms)})" for (name, reason), rooms in found.items()]


def left_undone(run: Run) -> list[str]:
    """What benches/gpu_suite.py did not measure, and where ours broke a promise."""
    failed, broken = (run.suite.get(key, {}) for key in ("failed", "broken"))
    found = [f"- failed: {name}: {why}" for name, why in failed.items()]
    found += [f"- wrong: {name}: {why}" for name, why in broken.items()]
    return found + [f"- no time left for: {name}" for name in run.suite.get("left_out", [])]


def exponents(growth: Iterable[Growth]) -> str:
    header = ["room", "case", "axis", "from, to", "at", "dtype", "contender", "time", "memory", "promised of ours"]
    lines = []
    for one in growth:
        memory = "" if one.memory_exponent is None else f"{one.memory_exponent:.2f}"
        promised = f"{one.promised['time']:g}, {one.promised['memory']:g}" if one.contender == OURS else ""
        sizes = [one.axis, f"{one.values[0]:,} to {one.values[-1]:,}", shape_of(one.fixed), one.dtype]
        lines.append([one.room, one.case, *sizes, one.contender, f"{one.time_exponent:.2f}", memory, promised])
    return table(header, lines, 7)
