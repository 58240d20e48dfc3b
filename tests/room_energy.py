"""What room `energy` is judged with, on every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def eager_energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return -temperature * torch.logsumexp(logits / temperature, -1)


def eager_joint_energy(logits: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logits).sum(-1)


def largest_finite(z: Tensor) -> Tensor:
    """Rounding E, as large as the logits, moves E / T and with it every softmax of the row by that much."""
    return z.abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True) if z.shape[-1] else torch.zeros(())


def terms_of_energy(temperature: float) -> Callable[[Tensor], Tensor]:
    """E = -(m + T log s): where the two cancel, the roundings of m, and of s times T, are what is left."""

    def size(z: Tensor) -> Tensor:
        largest = z.amax(-1).abs().nan_to_num(0.0, 0.0) if z.shape[-1] else z.sum(-1)
        return largest + temperature

    return size
