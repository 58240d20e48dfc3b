"""Inputs that several rooms share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_normal(generator: torch.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))


def random_logits(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> tuple[Tensor]:
    """Of deviation 4: some classes stand out."""
    return (random_normal(generator, shape, dtype, 4.0),)


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize
