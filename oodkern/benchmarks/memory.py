"""How much memory a work holds beyond its inputs: of a GPU the allocator's peak, of a CPU that of a fresh process.

On Linux a process can set the peak that the kernel keeps of it, VmHWM, to what it holds now. So in a process of its
own, which has made the inputs and done the work once (code is loaded then, threads have stacks, a compiler has come and
gone) and has given back what was freed, the peak of one more call less what was held before it is what the call took:
pages that were touched, allocations of every library included. (ru_maxrss would not do: it begins with the parent's.)
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from oodkern.benchmarks.case import Case

RESET = "/proc/self/clear_refs"
RESET_PEAK = "5"
PATIENCE_SECONDS = 600
# Of so many bytes on, glibc maps an allocation of its own and gives it back when it is freed. Left alone it raises that
# to the largest one that was freed, up to 32 MiB: smaller ones stay on a heap then, whose holes differ from run to run
# and add up to several times what is in use.
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 128 << 10


class NotMeasured(RuntimeError):
    """Memory cannot be measured here; says why."""


@dataclass(frozen=True)
class Peak:
    """The most that was held at once, and the part of it that is the result, in bytes."""

    bytes: int
    result: int

    @property
    def beyond(self) -> int:
        """Without the result."""
        return max(0, self.bytes - self.result)


def result_bytes(result: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ":"))


def peak_here(work: Callable[[], Any]) -> Peak:
    """Of one more call of a work, in this process, whose other threads rest. On Linux."""
    result = work()
    del result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open(RESET, "w") as file:
        file.write(RESET_PEAK)
    before = _status("VmRSS")
    result = work()
    return Peak(max(0, _status("VmHWM") - before), result_bytes(result))


def peak_on_cuda(work: Callable[[], Any], device: torch.device) -> Peak:
    """Of one more call, by PyTorch's allocator: of works that allocate through it."""
    work()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = work()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - before, result_bytes(result))


def _answer(connection: Connection, threads: int, cases: Sequence[Case], name: str) -> None:
    """In the other process: the peaks of one contender, of one case after the other."""
    torch.set_num_threads(threads)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    device = torch.device("cpu")
    try:
        peaks = []
        several = len(cases) > 1 and cases[0].contenders[name].compiled  # once, for all sizes
        function = cases[0].ready(name, dynamic=True) if several else None
        for case in cases:
            inputs, upstream = case.data(device)
            peaks.append(peak_here(case.work(name, inputs, upstream, function)))
            del inputs, upstream
        connection.send(peaks)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    """Processes are forks of one that has imported PyTorch and computed nothing: each begins in milliseconds, alike."""
    context = multiprocessing.get_context("forkserver")
    # What torch.autograd.grad and torch.compile import at their first calls: 7 s of every process, if not here.
    imported = ("torch.fx.experimental.symbolic_shapes", "torch._inductor.compile_fx")
    context.set_forkserver_preload(["oodkern.benchmarks.memory", *imported])
    # Several are at work at once: threads that wait must not spin there. It is read when the server loads OpenMP.
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_WAIT_POLICY") if before is None else os.environ.update(OMP_WAIT_POLICY=before)
    return context


def peaks_of_all(cases: Sequence[Case], names: Sequence[str]) -> dict[str, list[Peak]]:
    """`peaks_of` of several contenders, at the same time: each has a process of its own, and no time is taken."""
    if not names:
        return {}
    _context()
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(functools.partial(peaks_of, cases), names), strict=True))


def peaks_of(cases: Sequence[Case], name: str) -> list[Peak]:
    """The peaks of a contender on the CPU, of one case after the other, in a fresh process.

    Raises NotMeasured where the system keeps no such peak (not Linux), and RuntimeError where the process fails.
    """
    if not sys.platform.startswith("linux") or not os.access(RESET, os.W_OK):
        raise NotMeasured(f"{RESET} is not to be written here")
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, torch.get_num_threads(), cases, name))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        if not ours.poll(PATIENCE_SECONDS):
            raise RuntimeError(f"{cases[0].name}: no answer about {name}'s memory in {PATIENCE_SECONDS} s")
        answer = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{cases[0].name}: the process of {name} ended with exit code {process.exitcode}") from None
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
        ours.close()
    if isinstance(answer, str):
        raise RuntimeError(f"{cases[0].name}: {name}: {answer}")
    return answer
