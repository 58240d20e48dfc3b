"""Turns cases and sweeps into tests of pytest-benchmark: one a contender, in groups of room and shape.

The first test of a case measures all of its contenders, in turns; each test then hands its own times to
pytest-benchmark, whose clock is replaced by one that replays them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from oodkern.benchmarks.case import OURS, Case
from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.memory import Peak
from oodkern.benchmarks.timing import Times

SMOKE_SIZE = 48
EXPONENT_SLACK = {"time": 0.3, "memory": 0.1}


class Replay:
    """A clock that goes on by what was measured before: each turn by one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: list[float] = []

    def __call__(self) -> float:
        return self.now

    def turn(self) -> None:
        self.now += self.left.pop(0)


CLOCK = Replay()


def replay(benchmark, times: Times) -> None:
    CLOCK.left = list(times.seconds)
    benchmark.pedantic(CLOCK.turn, rounds=len(times.seconds), iterations=1)


def row_id(case: Case, name: str) -> str:
    return f"{case.title}-{case.shape}-{case.dtype}-{name}".replace(" ", "")


def contests(cases: Sequence[Case]):
    """The test of these cases: every contender gives a row; ours is held to twice eager's error."""
    pairs = [pytest.param(case, name, id=row_id(case, name)) for case in cases for name in case.contenders]

    @pytest.mark.benchmark(timer=CLOCK)
    @pytest.mark.parametrize(("case", "name"), pairs)
    def test(case, name, benchmark, contest):
        contest(benchmark, case, name)

    return test


def growths(sweeps: Sequence[Sweep]):
    """The test of these sweeps, a row a contender, with exponents; ours is held to what is promised."""
    pairs = [
        pytest.param(sweep, name, id=f"{sweep.case.title}-{sweep.axis}-{sweep.case.dtype}-{name}".replace(" ", ""))
        for sweep in sweeps
        for name, contender in sweep.case.contenders.items()
        if not contender.needs
    ]

    @pytest.mark.benchmark(timer=CLOCK)
    @pytest.mark.parametrize(("sweep", "name"), pairs)
    def test(sweep, name, benchmark, growth):
        growth(benchmark, sweep, name)

    return test


def smoke(case: Case) -> Case:
    """The same at sizes that take no time."""
    return case.at(**{name: min(size, SMOKE_SIZE) for name, size in case.sizes.items()})


def without_compiled(case: Case) -> Case:
    """In a smoke test nothing is compiled."""
    kept = {name: one for name, one in case.contenders.items() if not one.compiled}
    object.__setattr__(case, "contenders", kept)
    return case


def check_error(errors: dict[str, float | None], base: str, slack: float) -> None:
    """error of ours <= 2 * that of the base + slack."""
    ours, theirs = errors.get(OURS), errors.get(base)
    if ours is not None and theirs is not None:
        assert ours <= 2 * theirs + slack, f"error {ours:.1e}, that of {base} {theirs:.1e}"


def check_memory(peaks: dict[str, Peak | None], base: str, share: float | None) -> None:
    """memory of ours beyond results <= share * that of the base, where a share is promised and both were measured."""
    ours, theirs = peaks.get(OURS), peaks.get(base)
    if share is not None and ours is not None and theirs is not None:
        assert ours.beyond <= share * theirs.beyond, f"{ours.beyond:,} bytes, those of {base} {theirs.beyond:,}"
