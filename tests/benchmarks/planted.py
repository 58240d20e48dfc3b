"""Cases whose memory, errors and ends are known beforehand. Processes that are forked for memory import this too."""

from __future__ import annotations

import functools
import os

import torch

from oodkern.benchmarks.case import OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import random_normal

MB = 10**6


def floats(megabytes: int) -> int:
    return megabytes * MB // 4


def touches(x, temporary, result):
    """Writes both of so many megabytes; the temporary lives until the result is there."""
    between = torch.ones(floats(temporary))
    return torch.full((floats(result),), float(between[-1]))


def allocates(x, temporary, result):
    """The same and writes neither."""
    between = torch.empty(floats(temporary))
    return between.new_empty(floats(result))


def leaves_holes(x):
    """Holds 44 MB at most; on a heap the first 20 would be a hole that the 24 do not fit in."""
    first, second = torch.ones(floats(20)), torch.ones(floats(20))
    del first
    third = torch.ones(floats(24))
    return (second[-1] + third[-1])[None]


def fails(x):
    raise ValueError("no luck with x")


def ends(x):
    os._exit(7)


@case
def memory(*, N: int = 1, temporary: int = 64, result: int = 16) -> Case:
    sizes = {"temporary": temporary, "result": result}
    return Case(
        room="planted",
        title="memory",
        sizes={"N": N, **sizes},
        dtype="float32",
        passes="whole",
        inputs=functools.partial(plain, N),
        contenders={
            OURS: Contender(functools.partial(touches, **sizes)),
            "eager": Contender(functools.partial(allocates, **sizes)),
        },
    )


@case
def known(*, N: int = 1) -> Case:
    return Case(
        room="planted",
        title="known",
        sizes={"N": N},
        dtype="float32",
        passes="whole",
        inputs=functools.partial(plain, N),
        contenders={"holes": Contender(leaves_holes), "fails": Contender(fails), "ends": Contender(ends)},
        base="holes",
    )


def plain(N, generator):
    return (random_normal(generator, (N,), "float32"),)


def product(x, weight):
    return (x @ weight.T).logsumexp(-1)


def pair(N, D, K, dtype, generator):
    return random_normal(generator, (N, D), dtype), random_normal(generator, (K, D), dtype)


@case
def scores(*, N: int, D: int = 8, K: int = 5, dtype: str = "float64", passes: str = "backward") -> Case:
    """One score a row of features: the gradient of the weight sums over rows."""
    return Case(
        room="planted",
        title=f"scores, {passes}",
        sizes={"N": N, "D": D, "K": K},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(pair, N, D, K, dtype),
        contenders={
            OURS: Contender(product),
            "eager": Contender(product),
            "third": Contender(product, needs=("no_such_module_anywhere",)),
        },
        oracle=product,
        leaves=(0, 1),
        upstream=N,
        rows=(0,),
        flops=6.0 * N * D * K,
        bytes=8.0 * N * D,
    )
