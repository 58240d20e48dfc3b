"""What processes that work apart, without collectives, know of each other: who is done, who failed, who still moves."""

from __future__ import annotations

import itertools
import time
from types import TracebackType
from typing import Any

from oodkern.processes import PATIENCE, Elsewhere, Processes

POLL = 0.1  # seconds
JOBS = itertools.count()  # of several processes: the same numbers on all, which do these in the same order


class Heartbeat:
    """A `with` block of a job that every process enters, and leaves when all have done their parts.

    A collective waits ten minutes (`PATIENCE`) for the slowest, and parts of a job may take hours: so the processes
    count in the job's key-value store instead. `beat()` says that this one still moves, and raises Elsewhere where
    another failed: a failure ends all within one beat. At the end of the block this one waits for the others, as long
    as any of them beats; a RuntimeError where none did for `PATIENCE`, which is what a collective would say then.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes, self.job = processes, -1
        self.store: Any = None
        if processes.count > 1:  # what one does alone the others know nothing of
            import torch.distributed as dist

            self.job = next(JOBS)
            self.store = dist.distributed_c10d._get_default_store()

    def beat(self) -> None:
        if self.store is not None:
            self._add(f"beats{self.processes.rank}", 1)
            self._look()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is None:
            return
        if error is not None:
            if not isinstance(error, Elsewhere):
                self._add("failed", 1)
            return
        self._add("done", 1)
        seen: list[int] = []
        since = time.monotonic()
        while self._add("done", 0) < self.processes.count:
            self._look()
            beats = [self._add(f"beats{rank}", 0) for rank in range(self.processes.count)]
            if beats != seen:
                seen, since = beats, time.monotonic()
            elif time.monotonic() - since > PATIENCE.total_seconds():
                raise RuntimeError(f"Timed out waiting for {self.processes.count - self._add('done', 0)} processes")
            time.sleep(POLL)

    def _look(self) -> None:
        if self._add("failed", 0):
            raise Elsewhere

    def _add(self, name: str, amount: int) -> int:
        return self.store.add(f"oodkern/job{self.job}/{name}", amount)
