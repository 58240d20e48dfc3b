"""Endless random batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def stream(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices [batch_size] into `count` samples, for ever: shuffled, and shuffled anew on each wrap.

    Every batch is full: it runs over the end of a pass into the next one, so that each sample is seen once a pass.
    """
    if count < 1 or batch_size < 1:
        raise ValueError(f"count, batch_size: expected positive integers, got {count} and {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
