"""What tests of room `norm` share, on every device."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def over_last(function: Callable) -> Callable:
    """The norm over the last dimension, which is what the bar's ops reduce."""

    def rows(x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() in (0, 2):
            return function(x)
        return function(x.flatten(0, -2) if x.dim() > 1 else x[None]).reshape(x.shape[:-1])

    return rows


def eager_norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1)
