"""The subset of the benchmarks that `oodkern bench` runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from oodkern.benchmarks.case import OURS, Case
from oodkern.benchmarks.machine import ceilings
from oodkern.benchmarks.measure import Outcome, as_row, measure
from oodkern.benchmarks.rooms.contrast import info_nce
from oodkern.benchmarks.rooms.distill import distillation
from oodkern.benchmarks.rooms.energy import score
from oodkern.benchmarks.rooms.linear_energy import linear_score
from oodkern.benchmarks.rooms.losses import loss_step
from oodkern.benchmarks.rooms.norm import sample_norm
from oodkern.benchmarks.rooms.select import top_k
from oodkern.benchmarks.table import place

NORM_SIZE = 3 * 224 * 224  # of an image


def short_cases(device: torch.device) -> list[Case]:
    """Some of the rooms, at sizes that a call of the slowest contender takes a tenth of a second for on two cores."""
    if device.type == "cuda":
        return [
            score(N=262_144, K=1_000, dtype="bfloat16", passes="forward"),
            score(N=262_144, K=1_000, dtype="bfloat16", passes="backward"),
            linear_score(N=262_144, D=512, K=1_000, dtype="bfloat16", passes="forward"),
            loss_step(loss="energy", N=2_048, M=2_048, D=512, K=21_841, dtype="bfloat16"),
            info_nce(N=16_384, D=128, dtype="bfloat16"),
            sample_norm(N=256, D=NORM_SIZE, dtype="float32", passes="double backward"),
            distillation(N=65_536, K=1_000, dtype="bfloat16", passes="backward"),
            top_k(N=25_000_000, k=10_000),
        ]
    return [
        score(N=16_384, K=1_000, dtype="float32", passes="forward"),
        score(N=16_384, K=1_000, dtype="float32", passes="backward"),
        linear_score(N=8_192, D=512, K=1_000, dtype="float32", passes="forward"),
        loss_step(loss="energy", N=1_024, M=1_024, D=512, K=1_000, dtype="float32"),
        info_nce(N=2_048, D=128, dtype="float32"),
        sample_norm(N=16, D=NORM_SIZE, dtype="float32", passes="double backward"),
        distillation(N=8_192, K=1_000, dtype="float32", passes="backward"),
        top_k(N=2_500_000, k=10_000),
    ]


def measure_short(cases: list[Case], device: torch.device, seconds: float, log: Callable[[str], None]) -> list[Outcome]:
    """Each of the cases; memory of ours and the base alone. Where nothing can be compiled here, torch.compile is named
    absent. `log` is told of each case that is done."""
    outcomes = []
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        held = (OURS, case.base)
        try:
            outcome = measure(case, device, seconds, memory=held)
        except torch._dynamo.exc.TorchDynamoException as error:
            compiled = [name for name, one in case.contenders.items() if one.compiled]
            kept = {name: one for name, one in case.contenders.items() if name not in compiled}
            outcome = measure(dataclasses.replace(case, contenders=kept), device, seconds, memory=held)
            outcome.absent |= dict.fromkeys(compiled, str(error).splitlines()[0])
        outcomes.append(outcome)
        log(f"{number} of {len(cases)}: {place(case)}, {time.perf_counter() - began:.1f} s")
    return outcomes


def stored_rows(outcomes: list[Outcome], device: torch.device) -> list[dict[str, Any]]:
    """What is stored of every contender, as of the folder `benches`, with its times."""
    least = ceilings(device)
    return [
        {
            **as_row(outcome, name, least),
            "median_seconds": found.times.median,
            "quartile_seconds": list(found.times.quartiles),
            "turns": len(found.times.seconds),
        }
        for outcome in outcomes
        for name, found in outcome.found.items()
    ]
