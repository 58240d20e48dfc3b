"""How long works take: in turns, so that a machine that speeds up or slows down does so for all of them, and in another
order every turn, since what ran before leaves caches and threads as it does: the norm of 64 rows of 150,528 bfloat16
numbers takes 0.36 ms after itself, 0.44 after torch.compile's and 0.67 after PyTorch's sum of them in float32."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]

SHORTEST = 2e-3  # seconds of a turn on a CPU: shorter works are called several times a turn
SHORTEST_CUDA = 1e-4
SEED = 0
FLUSH_BYTES = 256 << 20  # beyond any L2 cache


@dataclass(frozen=True)
class Times:
    """Seconds of each turn, one call's."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


class CPUClock:
    shortest = SHORTEST

    def __call__(self, work: Work, calls: int) -> float:
        """Seconds of one of so many calls; what results are freed is not part of it for one call."""
        started = time.perf_counter()
        result = None
        for _ in range(calls):
            result = work()
        took = time.perf_counter() - started
        del result
        return took / calls


class CUDAClock:
    """By events on the stream, after a write that empties the L2 cache and keeps the device busy while calls queue."""

    shortest = SHORTEST_CUDA

    def __init__(self, device: torch.device):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.device = device

    def __call__(self, work: Work, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.random_()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def clock_of(device: torch.device) -> CPUClock | CUDAClock:
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


def interleaved(
    works: Mapping[str, Work],
    device: torch.device,
    seconds: float,
    fewest: int = 5,
    most: int = 31,
) -> dict[str, Times]:
    """Times of each of the works, taken in turns: as many as take about `seconds` in all, between `fewest` and `most`.

    The first call of each, which compiles, loads and allocates, does not count; the second says how many calls a turn
    of it has. Orders are random, and the same for as many works.
    """
    clock = clock_of(device)
    calls = {}
    for name, work in works.items():
        work()
        calls[name] = min(1000, max(1, round(clock.shortest / max(clock(work, 1), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in works}
    order, orders = list(works), random.Random(SEED)
    started, turns = time.perf_counter(), 0
    while turns < fewest or (turns < most and (time.perf_counter() - started) * (turns + 1) / turns < seconds):
        orders.shuffle(order)
        for name in order:
            times[name].append(clock(works[name], calls[name]))
        turns += 1
    return {name: Times(tuple(taken)) for name, taken in times.items()}
