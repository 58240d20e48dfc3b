"""What makes a model's training smaller or faster and leaves its numbers: see `Lean`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from oodkern.classifier import Classifier
from oodkern.config import ConfigError
from oodkern.schema import TrainConfig


class StillStatistics:
    """While entered, batch normalisation moves running statistics that are thrown away: of a pass that is made again.

    May be entered again, also while it is: a block is made again for every derivative that is taken of it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [one for one in module.modules() if isinstance(one, _BatchNorm)]
        self.kept: list[list[dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        self.kept.append([dict(one._buffers) for one in self.norms])
        for one in self.norms:
            # Other tensors in their place: what a graph has saved of them is not written to.
            copies = {name: value if value is None else value.clone() for name, value in one._buffers.items()}
            one._buffers.update(copies)

    def __exit__(self, *exception: object) -> None:
        for one, buffers in zip(self.norms, self.kept.pop(), strict=True):
            one._buffers.update(buffers)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: members of a Sequential or a ModuleList that are made of layers themselves.

    Of blocks within blocks the inner ones, where there are two at least.
    """
    found: list[nn.Module] = []
    for child in module.children():
        inner = blocks_of(child)
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(inner) < 2 and any(True for _ in child.children()):
            found.append(child)
        else:
            found += inner
    return found


def with_still_statistics(block: nn.Module) -> tuple[Any, Any]:
    """Contexts of a block's forward pass, and of the one that is made again for the backward pass."""
    return contextlib.nullcontext(), StillStatistics(block)


class Lean:
    """Activation checkpointing and compilation of a model, from here to `undo()`.

    checkpoint_activations: a block keeps its input alone and is computed again in the backward pass (torch's
        non-reentrant checkpointing, which can be differentiated twice), with the same random numbers, and without
        moving running statistics a second time.
    compile=backbone: torch.compile of what makes features.

    Both are attributes of this model's modules, of which a copy of the model knows nothing good: undo them first.
    """

    def __init__(self, model: Classifier, config: TrainConfig) -> None:
        self.changed: list[tuple[Any, str]] = []
        if config.checkpoint_activations:
            blocks = [block for block in blocks_of(model.model) if model.head not in block.modules()]
            if not blocks:
                raise ConfigError(
                    f"checkpoint_activations: found no blocks in {type(model.model).__name__}: expected a model with "
                    "modules of several layers in an nn.Sequential or nn.ModuleList"
                )
            for block in blocks:
                self.change(
                    block,
                    "forward",
                    functools.partial(
                        checkpoint,
                        block.forward,
                        use_reentrant=False,
                        context_fn=functools.partial(with_still_statistics, block),
                    ),
                )
        if config.compile == "backbone":
            if not model.by_protocol:
                raise ConfigError(
                    f"compile: backbone expects a model with forward_features and forward_head, as timm's, and "
                    f"{type(model.model).__name__} has none; compile the model itself, or take none"
                )
            self.change(model.model, "forward_features", torch.compile(model.model.forward_features))

    def change(self, module: Any, name: str, value: Any) -> None:
        setattr(module, name, value)
        self.changed.append((module, name))

    def undo(self) -> None:
        for module, name in self.changed:
            delattr(module, name)
        self.changed.clear()


def memory_format(config: TrainConfig) -> torch.memory_format:
    return torch.channels_last if config.channels_last else torch.contiguous_format
