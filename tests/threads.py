"""Whether an op shares its work out between threads, by the kernel's account of each thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def assert_shares_its_work(op: Callable[[], object]) -> None:
    """Two threads at least do a part of `op`'s work, and with one thread allowed no second one does.

    A part, not a half: the calling thread also allocates the result, and on a busy machine its time grows with the
    pages that the kernel clears for it (a quarter of its time was left to the other thread at times).
    """
    if (threads := torch.get_num_threads()) < 2 or not Path("/proc/self/schedstat").exists():
        pytest.skip(f"{threads} thread, or no account of threads in /proc")
    try:
        torch.set_num_threads(1)
        alone = _second(op)
    finally:
        torch.set_num_threads(threads)
    together = _second(op)
    assert alone < 0.02
    assert together > 0.05


def _second(op: Callable[[], object]) -> float:
    """The time of the second busiest thread over that of the busiest."""

    def busy() -> dict[str, int]:  # nanoseconds
        return {
            task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()
        }

    op()
    before = busy()
    for _ in range(20):
        op()
    worked = sorted(after - before.get(task, 0) for task, after in busy().items())
    return worked[-2] / worked[-1]
