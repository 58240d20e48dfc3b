"""The images of shards, batch by batch, each decoded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oodkern.data.images import ImageSet
from oodkern.data.stream import ignore_interrupts, relayed


class Read(NamedTuple):
    """Of a batch of a shard's rows: the readable images [n, C, H, W], their indices [n], and how many were asked for.

    `last` where the shard ends with it.
    """

    shard: int
    images: Tensor
    indices: Tensor
    rows: int
    last: bool


class ReadableBatches(Dataset):
    """The batches of some shards of a set: none reaches over the end of a shard, which has `shard_rows` images."""

    def __init__(self, images: ImageSet, shards: list[int], shard_rows: int, batch_size: int) -> None:
        self.images, self.shard_rows, self.batch_size = images, shard_rows, batch_size
        ends = [(shard * shard_rows, min((shard + 1) * shard_rows, len(images))) for shard in shards]
        self.starts = np.concatenate([np.arange(*end, batch_size) for end in ends] or [np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, batch: int) -> Read:
        start = int(self.starts[batch])
        shard = start // self.shard_rows
        end = min((shard + 1) * self.shard_rows, len(self.images))
        stop = min(start + self.batch_size, end)
        return Read(shard, *self.images.readable(torch.arange(start, stop)), stop - start, stop == end)

    def read(self, workers: int, pin_memory: bool) -> Iterator[Read]:
        """All of them in order, read by `workers` processes, or here where that is 0."""
        if not workers or len(self) < 2:
            return map(self.__getitem__, range(len(self)))
        loader: Any = DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),  # a loader would draw a seed from the global one
        )
        return relayed(loader)
