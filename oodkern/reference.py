"""All the mathematics in plain PyTorch: the documentation of every op, its oracle in tests, its fallback.

Every function here takes any floating dtype, computes in float32 at least, and is differentiable as often as
PyTorch can; nothing is fused and nothing is checked. Scores come out as float32 (float64 stays float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """The dtype of scores: float64 stays, everything else is computed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """E = -T log sum_k exp(z_k / T) over the last dimension.

    Not torch.logsumexp, whose gradient is NaN for a row of all -inf (here: E = +inf, gradient zero) and whose
    forward-mode derivative edits a saved tensor.
    """
    z = widen(logits)
    if z.shape[-1] == 0:
        return z.sum(-1) + torch.inf
    maximum = z.detach().amax(-1, keepdim=True)
    pivot = torch.where(maximum.isfinite(), maximum, 0.0)
    total = ((z - pivot) / temperature).exp().sum(-1)
    nothing = total == 0
    log_total = torch.where(nothing, 1.0, total).log()
    return torch.where(nothing, torch.inf, -(pivot.squeeze(-1) + temperature * log_total))


def joint_energy(logits: Tensor) -> Tensor:
    """J = sum_k softplus(z_k) over the last dimension, softplus(z) = log(1 + exp(z)) = max(z, 0) + log1p(exp(-|z|)).

    Written with two branches rather than with |z|, whose derivative at 0 is 0 and would make the slope there 1
    instead of 1/2. Not torch's softplus, which is linear past 20, nor its logsigmoid, whose second derivative
    sigmoid (1 - sigmoid) cancels for very negative z.
    """
    z = widen(logits)
    positive = z > 0
    return (torch.where(positive, z, 0.0) + torch.where(positive, -z, z).exp().log1p()).sum(-1)
