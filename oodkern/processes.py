"""The processes of a job, as `torchrun` starts them: who has which rows, and what all of them know together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # for one collective: the rest of a job waits no longer for a process that hangs


class Elsewhere(Exception):
    """The first process failed, and says why; this one ends with it."""


@dataclass(frozen=True)
class Processes:
    """`count` processes that do the same on shares of the same batches; this one is number `rank`.

    With one process nothing is communicated, and every method gives what it was given.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's positions of `total` in order: consecutive ones, as many as others have or one more or less.

        Every process has floor(total / count) at least.
        """
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n_r, ...] of all processes, those of process 0 first, on each of them. Without a gradient."""
        if self.count == 1:
            return rows
        import torch.distributed as dist

        rows = rows.detach().contiguous()
        lengths = [rows.new_zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(one) for one in lengths]
        # Collectives take tensors of one shape: the shorter ones are filled up, and cut again.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded)
        return torch.cat([one[:size] for one, size in zip(found, sizes, strict=True)])

    def of_first(self, values: Tensor) -> Tensor:
        """Process 0's values, of one shape and dtype on all."""
        if self.count == 1:
            return values
        import torch.distributed as dist

        values = values.contiguous()
        dist.broadcast(values, src=0)
        return values

    def take(self, rows: Tensor, chosen: Tensor, total: int) -> Tensor:
        """This process's share of chosen rows, in their order.

        `rows` are its share of `total`, and `chosen` positions in all of these, the same on every process. Each row
        goes to the one process that takes it.
        """
        if self.count == 1:
            return rows[chosen]
        import torch.distributed as dist

        everyone = [Processes(rank, self.count) for rank in range(self.count)]
        start = self.share(total).start
        sent = []
        for other in everyone:
            asked = chosen[other.share(len(chosen))] - start
            sent.append(rows[asked[(asked >= 0) & (asked < len(rows))]])
        mine = chosen[self.share(len(chosen))]
        ends = mine.new_tensor([other.share(total).stop for other in everyone])
        owner = torch.searchsorted(ends, mine, right=True)
        received = torch.bincount(owner, minlength=self.count).tolist()
        found = rows.new_empty(len(mine), *rows.shape[1:])
        dist.all_to_all_single(found, torch.cat(sent), received, [len(one) for one in sent])
        return torch.empty_like(found).index_copy_(0, owner.argsort(stable=True), found)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count == 1:
            return values
        import torch.distributed as dist

        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def most(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        import torch.distributed as dist

        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def mean_(self, tensors: list[Tensor]) -> None:
        """Floating tensors become their mean over the processes, in one collective."""
        if self.count == 1 or not tensors:
            return
        flat = self.sum(torch.cat([one.detach().double().flatten() for one in tensors])) / self.count
        for one, mean in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.data.copy_(mean.view_as(one))

    def objects(self, value: Any) -> list[Any]:
        """A value of each process, on each of them."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def once(self, work: Callable[[], T]) -> T:
        """What `work` gives where the first process alone does it; its error there, `Elsewhere` on the others."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        error: BaseException | None = None
        found: list[Any] = [False, None]
        if self.first:
            try:
                found = [True, work()]
            except BaseException as raised:
                error = raised
                if isinstance(raised, KeyboardInterrupt) or getattr(raised, "everywhere", False):
                    found = [False, raised]
        dist.broadcast_object_list(found, src=0)
        if error is not None:
            raise error
        if not found[0]:
            raise found[1] or Elsewhere
        return found[1]


ALONE = Processes()


def is_sharded(value: Any) -> bool:
    """Whether a value is a process's share of a tensor, a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "placements")


def whole(value: Any) -> Any:
    """The tensors that shares are of, in nested state; every process has to ask."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return value.full_tensor() if is_sharded(value) else value


def launched() -> bool:
    """Whether `torchrun`, or what sets its variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(cuda: bool) -> Processes:
    """Joins the job that this process was started for: by NCCL on GPUs, by Gloo on CPUs."""
    import torch.distributed as dist

    if not launched():
        return ALONE
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Ends what `join` began, where it did."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def own_rank_is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def first_to_speak() -> bool:
    """Whether no other process of the job has said yet why it ends: the first cause is the one to be read.

    Before they know one another, one of each machine speaks.
    """
    import torch.distributed as dist

    if not (launched() and dist.is_available() and dist.is_initialized()):
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("oodkern/spoken", 1) == 1
    except RuntimeError:  # who kept the store is gone
        return True


# What transports say of another end that is gone; out of memory, say, is nothing of the kind.
GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout"),
    *("remote process exited", "NCCL communicator was aborted", "Watchdog caught collective operation timeout"),
)


def lost(error: RuntimeError) -> bool:
    """Whether an error is that of a collective whose other end is gone."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or any(word in str(error) for word in GONE)
