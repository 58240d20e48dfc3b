"""A bench file: cases for a GPU of which some go wrong. Copied to where gpu_suite.py looks for it."""

import functools
import json
import os
from pathlib import Path

import torch

from oodkern.benchmarks.case import OURS, Case, Contender, case


def inputs(N, generator):
    return (torch.randn(N, 8, generator=generator),)


def eager(x):
    return x.sum(-1)


def witness(x):
    """Says what is kept by the time that this case is measured."""
    runs = list(Path(os.environ["SUITE_OUT"]).glob("*.json"))
    kept = [json.loads(run.read_text()) for run in runs]
    found = [[one["group"].split(",")[0] for one in run["benchmarks"]] for run in kept]
    Path(os.environ["SUITE_OUT"], "seen.txt").write_text(json.dumps([found, [run["suite"]["failed"] for run in kept]]))
    return eager(x)


def explode(x):
    raise ValueError("a kernel failed")


def end(x):
    os._exit(7)


def wrong(x):
    return 1.5 * eager(x)


OURS_OF = {"right": eager, "witness": witness, "explode": explode, "end": end, "wrong": wrong}


@case
def one(*, room, what, N, passes="forward"):
    return Case(
        room=room,
        title=f"{what}, {passes}",
        sizes={"N": N},
        dtype="float32",
        passes=passes,
        inputs=functools.partial(inputs, N),
        contenders={
            OURS: Contender(OURS_OF[what]),
            "eager": Contender(eager),
            "third": Contender(eager, needs=("no_such_module",)),
            "chunked": Contender(eager),
        },
        oracle=eager,
        upstream=N,
        rows=(0,),
        bytes=36 * N,
    )


GPU = [
    one(room="unheard of", what="wrong", N=1_000_000_000),
    one(room="unheard of", what="end", N=1_000_000_000),
    one(room="norm", what="witness", N=1_000_000_000),
    one(room="linear_energy", what="right", N=1_000_000_000, passes="backward"),
    one(room="linear_energy", what="explode", N=1_000_000_000),
]
