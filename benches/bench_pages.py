"""What large pages are worth to a fresh result (csrc/cpu/pages.h): `pytest benches/bench_pages.py`. On Linux."""

import ctypes
import functools
import sys

import torch
from runner import contests

from oodkern.benchmarks.case import Case, Contender, case

MADV_HUGEPAGE, PAGE = 14, 2 << 20


def advised(rows, columns):
    tensor = torch.empty(rows, columns)
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return tensor.fill_(1.0)


def plain(rows, columns):
    return torch.empty(rows, columns).fill_(1.0)


def sizes_alone(N, K, generator):
    return N, K


@case
def fresh(*, N: int, K: int) -> Case:
    return Case(
        room="pages",
        title="a fresh tensor, filled",
        sizes={"N": N, "K": K},
        dtype="float32",
        passes="whole",
        inputs=functools.partial(sizes_alone, N, K),
        contenders={"large pages": Contender(advised), "eager": Contender(plain)},
        bytes=4 * N * K,
    )


CASES = [fresh(N=65_536, K=1_000)] if sys.platform.startswith("linux") else []

test_pages = contests(CASES)
