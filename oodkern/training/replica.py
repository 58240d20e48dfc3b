"""A model among those of other processes: what its forward and backward passes go through."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oodkern.classifier import Classifier
from oodkern.config import ConfigError
from oodkern.methods.objective import Objective, Rows
from oodkern.processes import Processes
from oodkern.schema import TrainConfig


class Network(nn.Module):
    """Images to the rows of an objective: its model and, for its parameters, its loss in one module."""

    def __init__(self, model: Classifier, objective: Objective, with_loss: bool = True) -> None:
        super().__init__()
        self.model = model
        if with_loss:
            self.loss = objective.loss
        self.objective: Any = objective

    def forward(self, images: Tensor, features: bool = False) -> Any:
        return self.model.features(images) if features else self.objective.rows(self.model, images)


class Replica:
    """The model on one process or, by DistributedDataParallel, on each of several.

    A process's loss is its part of the step's, so gradients are summed over the processes where that class averages.
    Buffers are not broadcast: a second forward pass would then find those of the first written to. Instead running
    statistics become their mean over the processes after each step, which leaves all processes with the same model.
    """

    def __init__(self, model: Classifier, objective: Objective, processes: Processes, device: torch.device) -> None:
        self.model, self.processes = model, processes
        network = self.network_of(model, objective)
        self.statistics = moving_buffers(model, objective.loss) if processes.count > 1 else []
        self.network: Any = self.distribute(network, device) if processes.count > 1 else network
        self.modules = (model, objective.loss)

    def network_of(self, model: Classifier, objective: Objective) -> Network:
        return Network(model, objective)

    def distribute(self, network: Network, device: torch.device) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        ids = [device] if device.type == "cuda" else None
        # The name that it had before 2.13 is deprecated there.
        known = inspect.signature(DistributedDataParallel).parameters
        quiet: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        found = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True, **quiet)
        found.register_comm_hook(None, lambda state, bucket: summed(bucket))  # annotations are checked there
        return found

    def __call__(self, images: Tensor) -> Rows:
        return self.network(images)

    @contextlib.contextmanager
    def pass_over(self, last: bool) -> Iterator[None]:
        """Around a forward pass and its backward pass; gradients are summed over the processes in a step's last."""
        quiet = self.processes.count > 1 and not last
        with self.no_sync() if quiet else contextlib.nullcontext():
            yield

    def trained(self) -> list[nn.Parameter]:
        """The parameters as a loss finds them now."""
        return [one for module in self.modules for one in module.parameters() if one.requires_grad]

    def no_sync(self) -> Any:
        return self.network.no_sync()

    def inner_gradient(self) -> contextlib.AbstractContextManager[None]:
        """Around gradients that are formed between the forward pass and the backward pass, as of a gradient's norm."""
        return contextlib.nullcontext()

    def end_backward(self, parameters: Iterable[Tensor]) -> None:
        """After a step's last pass."""
        if self.processes.count == 1:
            return
        for name, one in self.network.module.named_parameters():
            if one.requires_grad and one.grad is None:  # then the others' gradients may not have been summed
                raise ConfigError(
                    f"model: with several processes every parameter that requires a gradient has to have a part in the "
                    f"loss, and {name} has none; freeze it, or leave it out of the model"
                )

    def end_step(self) -> None:
        self.processes.mean_(self.statistics)

    def export(self) -> None:
        """Brings the model that the replica was made of up to date; every process has to call it."""


def replica_of(
    model: Classifier, objective: Objective, config: TrainConfig, processes: Processes, device: torch.device
) -> Replica:
    """What a configuration asks for."""
    kind = Replica
    if processes.count > 1 and (config.parallel_head or config.parallel == "fully_shard"):
        from oodkern.training import shards

        kind = shards.ParallelHead if config.parallel_head else shards.FullyShard
    return kind(model, objective, processes, device)


def summed(bucket: Any) -> torch.futures.Future[Tensor]:
    """A bucket of gradients over all processes."""
    import torch.distributed as dist

    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def moving_buffers(model: nn.Module, loss: nn.Module) -> list[Tensor]:
    """Floating buffers that training moves: running statistics, and what a loss keeps."""
    found = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    kept = [value for name, value in loss.state_dict(keep_vars=True).items() if name in dict(loss.named_buffers())]
    return found + [one for one in kept if one.is_floating_point()]
