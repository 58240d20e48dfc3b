"""A model among those of other processes: what its forward and backward passes go through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodkern.classifier import Classifier
from oodkern.methods.objective import Objective, Rows
from oodkern.processes import Processes


class Network(nn.Module):
    """Images to the rows of an objective: its model and, for its parameters, its loss in one module."""

    def __init__(self, model: Classifier, objective: Objective) -> None:
        super().__init__()
        self.model, self.loss = model, objective.loss
        self.objective = objective

    def forward(self, images: Tensor) -> Rows:
        return self.objective.rows(self.model, images)


class Replica:
    """The model on one process or, by DistributedDataParallel, on each of several.

    A process's loss is its part of the step's, so gradients are summed over the processes where that class averages.
    Buffers are not broadcast: a second forward pass would then find those of the first written to. Instead running
    statistics become their mean over the processes after each step, which leaves all processes with the same model.
    """

    def __init__(self, model: Classifier, objective: Objective, processes: Processes, device: torch.device) -> None:
        self.model, self.processes = model, processes
        self.network: Any = Network(model, objective)
        self.statistics: list[Tensor] = []
        if processes.count > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.statistics = moving_buffers(self.network)
            ids = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.network, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self.network.register_comm_hook(None, lambda state, bucket: summed(bucket))  # annotations are checked there

    def __call__(self, images: Tensor) -> Rows:
        return self.network(images)

    @contextlib.contextmanager
    def pass_over(self, last: bool) -> Iterator[None]:
        """Around a forward pass and its backward pass; gradients are summed over the processes in a step's last."""
        quiet = self.processes.count > 1 and not last
        with self.network.no_sync() if quiet else contextlib.nullcontext():
            yield

    def end_step(self) -> None:
        self.processes.mean_(self.statistics)


def summed(bucket: Any) -> torch.futures.Future[Tensor]:
    """A bucket of gradients over all processes."""
    import torch.distributed as dist

    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def moving_buffers(network: nn.Module) -> list[Tensor]:
    """Floating buffers that training moves: running statistics, and what a loss keeps."""
    found = [
        buffer
        for module in network.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    loss: Any = network.loss
    kept = {id(one) for one in found}
    return found + [
        one
        for one in loss.state_dict(keep_vars=True).values()
        if isinstance(one, Tensor)
        and not isinstance(one, nn.Parameter)
        and one.is_floating_point()
        and id(one) not in kept
    ]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a process's share of one."""
    return hasattr(tensor, "placements")
