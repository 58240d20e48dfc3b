"""What large pages are worth to a fresh result (csrc/cpu/pages.h): `pytest benches/bench_pages.py -s`."""

import ctypes
import statistics
import sys
import time

import pytest
import torch

MADV_HUGEPAGE, PAGE = 14, 2 << 20


def fill(shape, advise):
    """Milliseconds to allocate, fill and free a tensor."""
    started = time.perf_counter()
    tensor = torch.empty(shape)
    if advise:
        begin = -(-tensor.data_ptr() // PAGE) * PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    tensor.fill_(1.0)
    del tensor
    return (time.perf_counter() - started) * 1e3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an advice of Linux")
def test_fresh_tensor(benchmark, rounds):
    shape = (65_536, 1_000)
    times = {False: [], True: []}
    for _ in range(rounds):
        for advise in times:
            times[advise].append(fill(shape, advise))
    for advise, name in ((False, "pages of 4 KiB"), (True, "large pages asked for")):
        median, worst = statistics.median(times[advise]), max(times[advise])
        benchmark.extra_info[name] = {"median": median, "worst": worst}
        print(f"\n{name}: median {median:.1f} ms, worst {worst:.1f} ms")
    benchmark.pedantic(fill, args=(shape, True), rounds=3)
