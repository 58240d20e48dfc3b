"""How time and memory of a case grow with one of its sizes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oodkern.benchmarks.case import Case
from oodkern.benchmarks.measure import first_failure
from oodkern.benchmarks.memory import NotMeasured, Peak, peak_on_cuda, peaks_of_all
from oodkern.benchmarks.timing import Times, interleaved

FLOOR_BYTES = 1 << 20  # less is noise of the allocator
DECADE = 10.0


@dataclass(frozen=True)
class Sweep:
    """A case, the size that grows, its values in ascending order, and the exponents of ours that are promised.

    `time` and `memory` are powers of the size: 1 is linear, 0 flat. Memory is that beyond results.
    """

    case: Case
    axis: str
    values: tuple[int, ...]
    time: float = 1.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        if self.axis not in self.case.sizes:
            raise ValueError(f"axis: expected one of {', '.join(self.case.sizes)}, got {self.axis!r}")
        if len(self.values) < 3 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"values: expected three or more that ascend, got {self.values}")

    @property
    def name(self) -> str:
        fixed = ", ".join(f"{name}={size:,}" for name, size in self.case.sizes.items() if name != self.axis)
        return f"{self.case.room}: {self.case.title} against {self.axis}, {fixed or 'alone'}, {self.case.dtype}"

    @property
    def cases(self) -> list[Case]:
        return [self.case.at(**{self.axis: value}) for value in self.values]


@dataclass(frozen=True)
class Growth:
    """Of one contender, at each value: times, and peaks where they can be had."""

    values: tuple[int, ...]
    times: tuple[Times, ...]
    peaks: tuple[Peak, ...] | None

    @property
    def time_exponent(self) -> float:
        """Over the last decade: below it calls cost what they cost, whatever the size."""
        kept = [i for i, value in enumerate(self.values) if value * DECADE >= self.values[-1]]
        kept = kept if len(kept) > 1 else [-2, -1]
        return exponent([self.values[i] for i in kept], [self.times[i].median for i in kept])

    @property
    def memory_exponent(self) -> float | None:
        """Of what is held beyond results, from 1 MiB on: less does not count as growth."""
        if self.peaks is None:
            return None
        return exponent(self.values, [max(peak.beyond, FLOOR_BYTES) for peak in self.peaks])


def exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """p of the power c * size^p that fits best, in least squares of logarithms."""
    x, y = ([math.log(one) for one in found] for found in (sizes, amounts))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def measure_growth(
    sweep: Sweep, device: torch.device, seconds: float = 0.25, *, fewest: int = 3, memory: bool = True
) -> dict[str, Growth]:
    """Every contender that is no third party's, at every value, in turns. torch.compile compiles once for all sizes.

    On a GPU those are left out for whose largest value memory is not enough.
    """
    cases = sweep.cases
    names = [name for name, contender in sweep.case.contenders.items() if not contender.needs]
    torch._dynamo.reset()
    ready = {name: sweep.case.ready(name, dynamic=True) for name in names if sweep.case.contenders[name].compiled}
    if device.type == "cuda":
        names = fitting(cases[-1], names, ready, device)
    times: dict[str, list[Times]] = {name: [] for name in names}
    peaks: dict[str, list[Peak]] = {name: [] for name in names}
    for case in cases:
        inputs, upstream = case.data(device)
        works = {name: case.work(name, inputs, upstream, ready.get(name)) for name in names}
        for name, found in interleaved(works, device, seconds, fewest).items():
            times[name].append(found)
        if memory and device.type == "cuda":
            for name, work in works.items():
                peaks[name].append(peak_on_cuda(work, device))
    if memory and device.type != "cuda":
        with contextlib.suppress(NotMeasured):
            peaks = peaks_of_all(cases, names)
    return {
        name: Growth(sweep.values, tuple(times[name]), tuple(peaks[name]) if peaks[name] else None) for name in names
    }


def fitting(case: Case, names: list[str], ready: Mapping[str, Callable[..., Any]], device: torch.device) -> list[str]:
    """The contenders that have memory enough."""
    inputs, upstream = case.data(device)
    works = {name: case.work(name, inputs, upstream, ready.get(name)) for name in names}
    return [name for name, work in works.items() if first_failure(case, name, work) is None]
