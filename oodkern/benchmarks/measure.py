"""Measures a case: the times of all contenders in turns, the memory and the error of each beside them."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from oodkern._errors import brief
from oodkern.benchmarks.case import OURS, Case, cotangents, run_passes
from oodkern.benchmarks.machine import Ceilings
from oodkern.benchmarks.memory import NotMeasured, Peak, peak_on_cuda, peaks_of_all
from oodkern.benchmarks.timing import Times, interleaved

ORACLE_ROWS = 4_096  # float64 temporaries of so many at a time
ERROR_NUMBERS = 1 << 24  # likewise


@dataclass
class Found:
    """What was measured of one contender. The error is the largest one in units of the oracle's largest magnitude."""

    times: Times
    peak: Peak | None
    error: float | None


@dataclass
class Outcome:
    """What was measured of a case; `absent` are the third parties that cannot run here, and why."""

    case: Case
    found: dict[str, Found]
    absent: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str = OURS, base: str | None = None) -> float:
        """How many times faster than the base a contender is."""
        return self.found[base or self.case.base].times.median / self.found[name].times.median


def measure(
    case: Case,
    device: torch.device,
    seconds: float = 3.0,
    *,
    fewest: int = 5,
    memory: bool | Container[str] = True,
) -> Outcome:
    """All contenders that can run on the device; only third parties may be missing.

    `seconds` is what the turns of all contenders take together, as far as the fewest turns allow. `memory`: of all
    contenders, of none, or of these.
    """
    absent = {name: why for name, one in case.contenders.items() if (why := one.missing(device))}
    names = [name for name in case.contenders if name not in absent]
    torch._dynamo.reset()  # what was compiled for other cases is not looked through
    inputs, upstream = case.data(device)
    works = {name: case.work(name, inputs, upstream) for name in names}
    if device.type == "cuda":
        absent |= {name: why for name, work in works.items() if (why := first_failure(case, name, work))}
        names = [name for name in names if name not in absent]
        works = {name: works[name] for name in names}
    errors = {name: error_of(case, work(), inputs, upstream) for name, work in works.items()}
    _remembered[:] = None, None  # of a GPU's memory the works have all
    held = names if memory is True else memory or ()
    held_at_most = peaks(case, {name: works[name] for name in names if name in held}, device)
    times = interleaved(works, device, seconds, fewest)
    return Outcome(case, {name: Found(times[name], held_at_most.get(name), errors[name]) for name in names}, absent)


def first_failure(case: Case, name: str, work: Any) -> str | None:
    """Why a rival's first call fails: a third party's for any reason, the others' for want of memory."""
    try:
        work()
    except Exception as error:
        if name == OURS or not (case.contenders[name].needs or isinstance(error, torch.OutOfMemoryError)):
            raise
        return brief(error)
    return None


def peaks(case: Case, works: dict[str, Any], device: torch.device) -> dict[str, Peak]:
    """Of all of these; none where the system cannot tell."""
    if device.type == "cuda":
        return {name: peak_on_cuda(work, device) for name, work in works.items()}
    try:
        return {name: found for name, (found,) in peaks_of_all([case], list(works)).items()}
    except NotMeasured:
        return {}


def error_of(case: Case, result: Any, inputs: tuple[Any, ...], upstream: Tensor) -> float | None:
    if case.error is not None:
        return case.error(result, inputs)
    if case.oracle is None:
        return None
    worst = 0.0
    for ours, exact in zip(_tensors(result), _exact(case, inputs, upstream), strict=True):
        if ours.shape != exact.shape:
            raise ValueError(f"{case.name}: expected a result of shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
        parts = zip(ours.reshape(-1).split(ERROR_NUMBERS), exact.reshape(-1).split(ERROR_NUMBERS), strict=True)
        largest = torch.stack([(a.double() - b).abs().max() for a, b in parts]).max()
        wrong = float(largest / exact.abs().max())
        worst = max(worst, math.inf if math.isnan(wrong) else wrong)
    return worst


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


_remembered: list[Any] = [None, None]  # the case that was judged last, and its oracle's results


def _exact(case: Case, inputs: tuple[Any, ...], upstream: Tensor) -> list[Tensor]:
    """The oracle's results, rows in parts where samples do not meet: what has rows is joined, the rest is added up."""
    if _remembered[0] is not case:
        _remembered[:] = case, _of_parts(case, inputs, upstream)
    return _remembered[1]


def _of_parts(case: Case, inputs: tuple[Any, ...], upstream: Tensor) -> list[Tensor]:
    def double(one: Any) -> Any:
        return one.double() if isinstance(one, Tensor) and one.is_floating_point() else one

    def run(inputs: tuple[Any, ...], upstream: Tensor) -> list[Tensor]:
        seconds = cotangents(inputs, case.leaves) if case.passes == "double backward" else []
        doubles = tree_map(double, (inputs, upstream, seconds))
        assert case.oracle is not None
        return _tensors(run_passes(case.passes, case.oracle, doubles[0], doubles[1], case.leaves, doubles[2]))

    if not case.rows:
        return run(inputs, upstream)
    count = len(inputs[case.rows[0]])
    kept: dict[int, list[Tensor]] = {}
    for start in range(0, count, ORACLE_ROWS):
        rows = slice(start, start + ORACLE_ROWS)
        cut = tuple(one[rows] if i in case.rows else one for i, one in enumerate(inputs))
        for i, part in enumerate(run(cut, upstream[rows] if upstream.dim() else upstream)):
            if i not in kept or case.passes == "forward" or case.leaves[i] in case.rows:
                kept.setdefault(i, []).append(part)
            else:
                kept[i][0] = kept[i][0] + part  # a thousand gradients of a head would be 90 GB
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in kept.values()]


def as_row(outcome: Outcome, name: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """What is stored of one contender of a case, beside its times: plain numbers and words."""
    case, found = outcome.case, outcome.found[name]
    row: dict[str, Any] = {
        "room": case.room,
        "case": case.title,
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "passes": case.passes,
        "contender": name,
        "base": case.base,
        "told": case.contenders[name].told or case.contenders[name].by_hand,
        "target": case.target,
        "why": case.why,
        "error": found.error,
        "peak_bytes": found.peak and found.peak.bytes,
        "beyond_bytes": found.peak and found.peak.beyond,
        "result_bytes": found.peak and found.peak.result,
        "flops": case.flops,
        "bytes": case.bytes,
        "absent": outcome.absent,
    }
    if ceilings is not None and (case.flops or case.bytes):
        least = ceilings.seconds(case.flops, case.bytes, case.dtype)
        row |= {"least_seconds": least, "roofline": least / found.times.median}
    return row
