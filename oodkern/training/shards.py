"""A model of which each process has a share: all of it by FSDP2, or the classes of its head.

What is sharded is a copy; the model itself, which is validated and saved, is brought up to date by `export`, and lies
in the memory of the CPU meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oodkern.classifier import Classifier
from oodkern.config import ConfigError
from oodkern.methods.objective import Objective, Rows
from oodkern.processes import Processes, is_sharded, whole
from oodkern.training.memory import blocks_of
from oodkern.training.replica import Network, Replica


class Sharded(Replica):
    def __init__(self, model: Classifier, objective: Objective, processes: Processes, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (processes.count,))
        self.whole, self.device, self.stale = model, device, False
        # What DistributedDataParallel does for what it is given.
        for module in (model, objective.loss):
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                tensor.data.copy_(processes.of_first(tensor.detach()))
        super().__init__(copy.deepcopy(model), objective, processes, device)

    def __call__(self, images: Tensor) -> Rows:
        if not self.stale:
            self.whole.to("cpu")
            self.stale = True
        return super().__call__(images)

    def export(self) -> None:
        if self.stale:
            self.whole.load_state_dict(whole(self.model.state_dict()))
            self.whole.to(self.device)
            self.stale = False


class ParallelHead(Sharded):
    """Each process has a share of the head's classes, and by DistributedDataParallel all of the rest."""

    def distribute(self, network: Network, device: torch.device) -> nn.Module:
        from torch.distributed.tensor import Shard, distribute_tensor
        from torch.nn.parallel import DistributedDataParallel

        if not self.model.by_protocol:
            raise ConfigError(
                "parallel_head: expected a model with forward_features and forward_head, as timm's, whose head is not "
                f"called for its features; {type(self.model.model).__name__} has none"
            )
        head = self.model.head
        for name, parameter in list(head.named_parameters()):
            share = distribute_tensor(parameter.detach(), self.mesh, [Shard(0)])
            setattr(head, name, nn.Parameter(share))
        own = [name for name, parameter in network.named_parameters() if is_sharded(parameter)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, own)
        return super().distribute(network, device)


class FullyShard(Sharded):
    """Each process has a share of every parameter, gathered block by block when it is needed.

    Gradients are summed and parted anew after every pass, so that no process ever holds all of them.
    """

    def network_of(self, model: Classifier, objective: Objective) -> Network:
        return Network(model, objective, with_loss=False)  # a few small layers at most, which every process has

    def distribute(self, network: Network, device: torch.device) -> nn.Module:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for block in blocks_of(self.model.model):
            if self.model.head not in block.modules():
                fully_shard(block, mesh=self.mesh)
        fully_shard(network, mesh=self.mesh)
        # Parameters are gathered by calls of this module.
        network.objective.features_of = lambda model, images: network(images, features=True)
        self.parted: list[Any] = [one for one in network.modules() if isinstance(one, FSDPModule)]  # the root first
        for one in self.parted:  # sums, not means, by what every backend has
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)
        return network

    def no_sync(self) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def inner_gradient(self) -> Iterator[None]:
        """All parameters are gathered once, and stay until the step's own backward pass, as gradients stay where they
        are formed: else the second differentiation finds parameters that were given back, or that backward pass no
        gradient at all (measured). And no process waits for others inside: each selects, and so forwards, as many
        images as it likes.
        """
        for one in self.parted:
            one.unshard()
        self.keep_whole(True)
        try:
            yield
        finally:
            self.keep_whole(False)

    def keep_whole(self, keep: bool) -> None:
        for one in self.parted:
            one.set_is_last_backward(not keep)
            one.set_requires_gradient_sync(not keep, recurse=False)
            one.set_reshard_after_backward(not keep, recurse=False)
            # What is left whole between forward and backward pass at other times: the root, as is FSDP2's default.
            one.set_reshard_after_forward(not keep and one is not self.parted[0], recurse=False)

    def end_backward(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of what is not sharded."""
        for one in parameters:
            if one.grad is not None and not is_sharded(one):
                one.grad = self.processes.sum(one.grad)


def shared_out(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """An optimizer's state of whole tensors as that of the parameters' shares."""
    from torch.distributed.tensor import distribute_tensor

    for i, parameter in enumerate(parameters):
        own = state["state"].get(i, {})
        for name, value in own.items():
            if is_sharded(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape:
                kind: Any = parameter
                own[name] = distribute_tensor(value.to(kind.device), kind.device_mesh, kind.placements)
    return state
