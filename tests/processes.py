"""A function in several processes of one job on the CPU, with what it gives in each."""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240.0  # seconds for the call; then every process that is not done says where it is, and ends
START = 120.0  # seconds for a process to begin with it
MOURNING = 3.0  # seconds that the others have to fail of themselves once one has failed


def run(function: Callable[..., Any], count: int, *arguments: Any, patience: float = PATIENCE) -> list[Any]:
    """function(*arguments) in `count` new processes of one Gloo group, each with one thread: the results by rank.

    The function is one of a module's top level, and its arguments and results are what torch.save takes. The
    variables that `torchrun` sets are there too. A process that raises, dies or takes too long makes this raise an
    AssertionError that holds its traceback, that of the first one to fail on top, and ends the others.
    """
    context = get_context("spawn")  # no threads and locks of this process, which a fork would copy as they are
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save((function, arguments), folder / "call")
        processes = [
            context.Process(target=_process, args=(name, rank, count, patience), daemon=True) for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            _await(processes, time.monotonic() + START + patience + MOURNING)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        if any(process.exitcode for process in processes):
            raise AssertionError(_account(processes, folder))
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(count)]


def _await(processes: list[Any], deadline: float) -> None:
    """Until all have ended, or one has failed and the others had time to say what they make of it."""
    alive = list(processes)
    while alive and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in alive], left)
        if any(process.exitcode for process in alive):
            deadline = min(deadline, time.monotonic() + MOURNING)
        alive = [process for process in alive if process.exitcode is None]


def _account(processes: list[Any], folder: Path) -> str:
    """What failed where, in order of time; a process without a word of its own last."""
    told = []
    for rank, process in enumerate(processes):
        if process.exitcode == 0:
            continue
        for kind, why in (("error", "raised"), ("stack", "was not done in time, and was here")):
            path = folder / f"{kind}{rank}"
            if path.exists() and path.stat().st_size:
                told.append((path.stat().st_mtime, f"process {rank} {why}:\n{path.read_text()}"))
                break
        else:
            told.append((float("inf"), f"process {rank} was ended or died: exit code {process.exitcode}"))
    return "\n\n".join(text for _, text in sorted(told))


def _process(name: str, rank: int, count: int, patience: float) -> None:
    folder = Path(name)
    stack = (folder / f"stack{rank}").open("w")  # open as long as the process may be asked where it is
    faulthandler.dump_traceback_later(START, exit=True, file=stack)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    # Otherwise the address of the host's name, which a container may not be able to resolve.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=timedelta(seconds=600)
        )
        torch.manual_seed(0)
        function, arguments = torch.load(folder / "call", weights_only=False)
        faulthandler.dump_traceback_later(patience, exit=True, file=stack)
        torch.save(function(*arguments), folder / f"result{rank}")
        dist.barrier()  # no process takes its end of the connections away from another
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for a collective that never ends
    faulthandler.cancel_dump_traceback_later()
    stack.close()
