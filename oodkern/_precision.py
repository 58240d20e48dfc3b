"""The precision that scores are computed in, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def autocasting(tensor: Tensor) -> bool:
    """Whether products of such tensors would be formed in autocast's dtype."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def unrounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps autocast from rounding what is widened here: products of matrices are among what it casts."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if not autocasting(first):
            return function(first, *arguments, **keywords)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **keywords)

    return wrapped


def widen(tensor: Tensor) -> Tensor:
    """The dtype of scores: float64 stays, everything else is computed in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
