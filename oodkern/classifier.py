"""Logits and penultimate features of any `nn.Module`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Where a classifier keeps the layer that makes its logits, in the order they are looked up.
HEADS = ("get_classifier", "fc", "head", "classifier", "heads")


class Output(NamedTuple):
    """logits [N, K], and features [N, D]: what the linear head, whose output mostly are the logits, was given."""

    logits: Tensor
    features: Tensor


class Classifier(nn.Module):
    """Any classifier, its images normalised, its head and penultimate features at hand.

    `classifier(images)` gives logits, `classifier.outputs(images)` an Output with the features too, from one forward
    pass, `classifier.features(images)` the features alone, with no logits formed. They are found by the first of
      - timm's protocol, `forward_features` and `forward_head(..., pre_logits=True)`;
      - a forward pre-hook on the head, registered once, here, and removed by `close()` (or at the end of a
        `with` block).

    Args:
        model: makes logits [N, K] of images [N, C, H, W].
        head: the dotted name of its last linear layer; by default looked up as `get_classifier()`, `fc`, `head`,
            `classifier`, `heads`: the last nn.Linear of whatever that is.
        mean, std: of the pixels, one for each channel: images are taken in [0, 1] and normalised by them. Buffers, so
            that a checkpoint carries them. By default images go to the model as they are.

    Raises ValueError where no head is found, saying where it was looked for.
    """

    model: Any  # an nn.Module, perhaps with the methods of a protocol
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        head: str | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean, std: expected as many of each, std positive, got {list(mean)} and {list(std)}")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.head_name = find_head(model, head)
        self._features: list[Tensor] = []
        self._listening = self._skipping = False
        # A head that was named is meant, whatever protocol the model speaks.
        self.by_protocol = head is None and speaks_timm(model)
        self._hook = None if self.by_protocol else self.head.register_forward_pre_hook(self._listen)

    @property
    def head(self) -> nn.Linear:
        """The linear layer that makes logits of features: weight [K, D], bias [K] or None."""
        found = self.model.get_submodule(self.head_name)
        assert isinstance(found, nn.Linear)
        return found

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))

    def outputs(self, images: Tensor) -> Output:
        """Logits and features of images [N, C, H, W] in one forward pass."""
        images = self.normalize(images)
        if self.by_protocol:
            features = self._by_protocol(images)
            return Output(self.head(features), features)
        return Output(*self._by_hook(images))

    def features(self, images: Tensor) -> Tensor:
        """Features [N, D] of images [N, C, H, W], of a forward pass like any other but for the logits.

        By protocol the head is not called. Else the model runs to its end, so that whatever is in it runs, but its
        head is given no rows, and what it returns is as large as the logits and takes no memory: one number expanded.
        """
        images = self.normalize(images)
        if self.by_protocol:
            return self._by_protocol(images)
        self._skipping = True
        try:
            with self.head.register_forward_hook(self._stand_in):
                return self._by_hook(images)[1]
        finally:
            self._skipping = False

    def _by_protocol(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)

    def _by_hook(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._hook is None:
            raise RuntimeError("this Classifier was closed: its hook on the head is gone")
        self._features.clear()
        self._listening = True
        try:
            logits = self.model(images)
            if len(self._features) != 1:
                raise RuntimeError(
                    f"head: expected {self.head_name} to be called once in a forward pass, it was called "
                    f"{len(self._features)} times; name another layer"
                )
            return logits, self._features[0]
        finally:
            self._listening = False
            self._features.clear()

    def _listen(self, head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self._listening:
            self._features.append(arguments[0])
        return (arguments[0][:0],) if self._skipping else None

    def _stand_in(self, head: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        rows = self._features[-1].shape[:-1]
        return logits.new_zeros(()).expand(*rows, logits.shape[-1])

    def close(self) -> None:
        """Removes the hook; logits still work."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def speaks_timm(model: Any) -> bool:
    """Whether features of timm's protocol go through the linear head alone to become the logits."""
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "forward_head", "get_classifier")):
        return False
    return isinstance(model.get_classifier(), nn.Linear)


def find_head(model: nn.Module, head: str | None = None) -> str:
    """The dotted name of the linear layer that makes a model's logits."""
    names = {module: name for name, module in model.named_modules()}
    if head is not None:
        if head not in names.values() or not isinstance(model.get_submodule(head), nn.Linear):
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            raise ValueError(f"head: expected the name of an nn.Linear, one of {', '.join(linear)}, got {head!r}")
        return head
    for attribute in HEADS:
        found = getattr(model, attribute, None)
        if attribute == "get_classifier":
            found = found() if callable(found) else None
        if isinstance(found, nn.Module):
            layers = [module for module in found.modules() if isinstance(module, nn.Linear)]
            if layers:
                return names[layers[-1]]
    raise ValueError(
        f"head: {type(model).__name__} has no linear layer as {', '.join(HEADS[1:])} or of get_classifier(); name it"
    )
