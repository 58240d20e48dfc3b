"""How benchmarks measure: side by side, interleaved, medians; memory and error in the same row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import memory_events
from torch import Tensor
from torch.utils._pytree import tree_leaves

Work = Callable[[], Any]


@dataclass
class Row:
    """One case: what was timed, and for each contender its median, peak extra memory and error.

    `megabytes` is the most that was held at once, results included; `beyond` is the same without them. Contenders are
    compared with `base`.
    """

    room: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    milliseconds: dict[str, float]
    megabytes: dict[str, float]
    error: dict[str, float]
    beyond: dict[str, float] = field(default_factory=dict)
    target: float | None = None  # the ratio to eager that was aimed for
    skipped: dict[str, str] = field(default_factory=dict)
    base: str = "eager"

    @property
    def ratio(self) -> float | None:
        """How many times faster than the base ours is, where it is one contender."""
        ours = self.milliseconds.get("oodkern")
        return None if ours is None else self.milliseconds[self.base] / ours


def interleaved_medians(contenders: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns, so that a machine that speeds up or slows down does so for all.

    The first turn warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            result = work()
            took = time.perf_counter() - started
            del result  # freeing is not part of the next one's time
            if turn:
                times[name].append(took * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_megabytes(work: Work) -> float:
    """The most that `work` held at once beyond what it was given, its result included."""
    held = peak = 0
    for change in memory_events(work):
        held += change
        peak = max(peak, held)
    return peak / 1e6


def side_by_side(
    room: str,
    case: str,
    shape: tuple[int, ...],
    dtype: str,
    contenders: Mapping[str, Work],
    compiled: Work | None,
    error_of: Callable[[Any], float],
    rounds: int,
    target: float | None = None,
) -> Row:
    """Times, memory and errors of contenders, "oodkern" and "eager" among them, and of what torch.compile makes of
    `compiled`, a function that compiles at its first call."""
    contenders, skipped = dict(contenders), {}
    if compiled is not None:
        torch._dynamo.reset()
        try:
            compiled()
            contenders["torch.compile"] = compiled
        except Exception as error:  # no working compiler behind torch.compile is no reason to stop
            skipped["torch.compile"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    peak, beyond, error = {}, {}, {}
    for name, work in contenders.items():
        result = work()
        error[name] = error_of(result)
        own = sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor)) / 1e6
        del result
        peak[name] = peak_megabytes(work)
        beyond[name] = max(peak[name] - own, 0.0)
    times = interleaved_medians(contenders, rounds)
    return Row(room, case, shape, dtype, times, peak, error, beyond, target, skipped)


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Largest error in units of the largest magnitude of the oracle (float64 of the rounded inputs)."""
    return float((result.double() - oracle).abs().max() / oracle.abs().max())


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        model = "unknown"
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": model, "capability": capability, "threads": torch.get_num_threads(), "torch": torch.__version__}
