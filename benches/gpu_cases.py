"""The cases of the lists GPU of benches/bench_*.py: each measured in another process, which may fail, and kept at once.

`python benches/gpu_cases.py FOLDER` computes ours of all of them at tiny sizes: for compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # a process that has just built the package does not find it otherwise

from gpu_kept import Kept  # noqa: E402
from runner import check_error, check_memory, smoke, without_compiled  # noqa: E402

from oodkern._errors import brief  # noqa: E402
from oodkern.benchmarks import machine as machines  # noqa: E402
from oodkern.benchmarks.case import Case  # noqa: E402
from oodkern.benchmarks.machine import Ceilings, ceilings, machine  # noqa: E402
from oodkern.benchmarks.measure import Outcome, as_row, measure  # noqa: E402

ORDER = ("linear_energy", "losses", "contrast", "norm", "distill", "heads", "energy", "subspace")
TURNS_SECONDS = 1.0  # of all contenders of a case together
PATIENCE_SECONDS = 120.0  # a case that takes longer hangs
ODD_SIZE = 77
TINY_COPY_BYTES, TINY_SIDE = 1 << 20, 128


def read_cases(folder: Path) -> tuple[list[tuple[str, Case]], dict[str, str]]:
    """Modules and cases, the important first; and the modules that cannot be read, and why."""
    sys.path.insert(0, str(folder))
    cases, unread = [], {}
    for path in sorted(folder.glob("bench_*.py")):
        try:
            cases += [(path.stem, case) for case in getattr(importlib.import_module(path.stem), "GPU", ())]
        except Exception as error:  # of a module that would not keep the others from being measured
            unread[path.stem] = brief(error)
    return sorted(cases, key=lambda one: importance(one[1])), unread


def importance(case: Case) -> tuple[int, bool]:
    """By rooms; scores of pools before their gradients."""
    room = ORDER.index(case.room) if case.room in ORDER else len(ORDER)
    return room, case.room == ORDER[0] and case.passes != "forward"


class Lost(RuntimeError):
    """The process that measures ended, or does not answer."""


class Worker:
    """A process that measures one case after the other: errors of kernels that no later call survives stay there."""

    def __init__(self, device: str, tiny: bool, known: Ceilings | None, patience: float):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, device, tiny, known))
        self.process.start()
        theirs.close()
        self.machine, self.ceilings = self.answer(patience)

    def ask(self, case: Case, patience: float) -> tuple[str, Any]:
        with contextlib.suppress(OSError):  # the answer says how it ended
            self.connection.send(case)
        return self.answer(patience)

    def answer(self, patience: float) -> Any:
        try:
            if self.connection.poll(max(patience, 0.0)):
                return self.connection.recv()
            why = f"no answer in {patience:.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            why = f"its process ended with exit code {self.process.exitcode}"
        self.end()
        raise Lost(why)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, device_name: str, tiny: bool, known: Ceilings | None) -> None:
    """In the other process: says what the machine is and can do; then measures the cases that come."""
    device = torch.device(device_name)
    if tiny:
        machines.COPY_BYTES[device.type], machines.SIDE[device.type] = TINY_COPY_BYTES, TINY_SIDE
    known = known or ceilings(device)
    empty_cache(device)
    connection.send((machine(device), known))
    while True:
        try:
            case = connection.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            if tiny:
                outcome = measure(without_compiled(smoke(case)), device, 0, fewest=1, memory=False)
            else:
                outcome = measure(case, device, TURNS_SECONDS)
            found = [(name, as_row(outcome, name, known), one.times.seconds) for name, one in outcome.found.items()]
            answer: tuple[str, Any] = "measured", (outcome.case, found, broken_promises(outcome))
            del outcome
        except torch.OutOfMemoryError as error:
            answer = "out of memory", brief(error)
        except Exception as error:
            traceback.print_exc()
            answer = "failed", brief(error)
        connection.send(answer)
        empty_cache(device)


def empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def broken_promises(outcome: Outcome) -> list[str]:
    case, found = outcome.case, outcome.found
    broken = []
    for check, field, limit in ((check_error, "error", case.slack), (check_memory, "peak", case.memory_share)):
        try:
            check({name: getattr(one, field) for name, one in found.items()}, case.base, limit)
        except AssertionError as error:
            broken.append(str(error).splitlines()[0])
    return broken


def measure_all(
    cases: list[tuple[str, Case]], kept: Kept, device: str, tiny: bool, until: float, say: Callable[[str], None]
) -> None:
    """Until that time of time.monotonic: a case begins where as much is left as one took on average."""
    worker: Worker | None = None
    known: Ceilings | None = None
    took: list[float] = []
    try:
        for i, (module, case) in enumerate(cases):
            begun = time.monotonic()
            left = until - begun
            if left <= (mean(took) if took else 0.0):
                kept.suite["left_out"].append(case.name)
                continue
            say(f"[{i + 1}/{len(cases)}, {left:.0f} s left] {case.name}")
            try:
                if worker is None:
                    worker = Worker(device, tiny, known, min(left, PATIENCE_SECONDS))
                    known = worker.ceilings
                    kept.all["machine_info"] = {**worker.machine, "commit": kept.revision}
                    begun = time.monotonic()
                verdict, found = worker.ask(case, min(until - begun, PATIENCE_SECONDS))
            except Lost as error:
                worker = None
                if time.monotonic() >= until:
                    kept.suite["left_out"].append(case.name)
                    continue
                verdict, found = "lost", str(error)
            except Exception as error:  # a case that does not go to other processes
                verdict, found = "failed", brief(error)
            if verdict == "measured":
                kept.add(module, *found)
            else:
                say(f"  {found}")
                kept.suite["failed"][case.name] = found
                if verdict == "failed" and worker is not None:
                    worker.end()
                    worker = None
            took.append(time.monotonic() - begun)
            kept.save()
    finally:
        if worker is not None:
            worker.end()
    kept.save()


def odd(case: Case) -> Case:
    """At sizes that no vector, tile or block divides."""
    return case.at(**{name: min(size, ODD_SIZE) for name, size in case.sizes.items()})


def ours_at_tiny_sizes(folder: Path) -> int:
    """Of each case what is timed, by ours alone; how many fail."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, unread = read_cases(folder)
    for module, why in unread.items():
        print(f"failed: {module}: {why}", flush=True)
    failed = len(unread)
    done = set()
    for make, (_, case) in itertools.product((smoke, odd), cases):
        try:
            tiny = make(case)
            if tiny.name in done:
                continue
            done.add(tiny.name)
            tiny.work(next(iter(tiny.contenders)), *tiny.data(device))()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            print(f"computed: {tiny.name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"failed: {case.name}: {brief(error)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(ours_at_tiny_sizes(Path(sys.argv[1]).resolve()), 1))
