"""What tests on a real device share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def through_gpu(function: Callable) -> Callable:
    """Of tensors on the CPU, to the CPU; strides travel along where they are dense."""

    def to(device: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(to(device, one) for one in value)
        return value.to(device) if isinstance(value, Tensor) else value

    def moved(*arguments: Any, **named: Any) -> Any:
        return to("cpu", function(*to("cuda", arguments), **{name: to("cuda", value) for name, value in named.items()}))

    return moved


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").mul(3).to(dtype)
