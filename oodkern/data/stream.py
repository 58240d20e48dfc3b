"""Endless streams of random batches, each a function of its number."""

from __future__ import annotations

import functools
import itertools
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oodkern.data.augment import Augmentation, random_numbers
from oodkern.data.images import DataError, FileSet, ImageSet
from oodkern.processes import ALONE, Processes


@functools.lru_cache(maxsize=8)
def order(seed: int, stream: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The permutation of `count` samples in one pass of a stream."""
    # Augmentations have the highest word of the counter, passes the one below: no two draws share a block.
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, epoch + 1, 0]))
    return generator.permutation(count)


class Batches(Dataset):
    """Batch number b of a stream: the samples at positions b * batch_size, ..., each seen once in every pass.

    Position p stands in pass p // N, whose order is drawn anew; a batch runs over the end of a pass into the next,
    so every batch is full. Order and augmentation are functions of (seed, stream, position) alone, whoever reads it:
    of several processes each has its share of every batch, and none has to be told which pass it is.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int = 0,
        stream: int = 0,
        augmentation: Augmentation | None = None,
        processes: Processes = ALONE,
    ) -> None:
        if len(images) < 1 or batch_size < 1:
            raise ValueError(
                f"images, batch_size: expected one image at least and a positive size, got {len(images)} images and "
                f"batch_size {batch_size}"
            )
        self.source, self.batch_size, self.augmentation = images, batch_size, augmentation
        self.seed, self.stream, self.processes = seed, stream, processes

    def positions(self, batch: int) -> NDArray[np.int64]:
        """Of a whole batch, [batch_size]."""
        return np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)

    def indices(self, batch: int) -> Tensor:
        """Indices [batch_size] of the samples of a whole batch."""
        return self._samples(self.positions(batch))

    def _samples(self, positions: NDArray[np.int64]) -> Tensor:
        count = len(self.source)
        epochs = positions // count
        chosen = [
            order(self.seed, self.stream, int(e), count)[positions[epochs == e] % count] for e in np.unique(epochs)
        ]
        return torch.from_numpy(np.concatenate(chosen))

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] of this process's share of a batch, and their labels."""
        images, labels, _ = self.read(batch)
        return images, labels

    def read(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [n, C, H, W] of this process's share of a batch, their labels, and their indices [n].

        The indices are those of `indices(batch)`, but where the set took another image for an unreadable one.
        """
        positions = self.positions(batch)[self.processes.share(self.batch_size)]
        indices = self._samples(positions)
        augment = self.augmentation
        if augment is None:
            images, indices = self.source.read(indices)
            return images, self.source.labels[indices], indices
        numbers = random_numbers(self.seed, self.stream, torch.from_numpy(positions), augment.numbers)
        view = augment.view and partial(seen, augment.view, numbers)
        images, indices = self.source.read(indices, view)
        return augment.apply(images, numbers), self.source.labels[indices], indices

    def read_by_all(self, batch: int, own: Tensor, device: torch.device) -> Tensor:
        """Indices [batch_size] of what all processes read of a batch, each giving those [n] that its share has."""
        if self.processes.count == 1:
            return own
        planned = self.indices(batch)
        if not isinstance(self.source, FileSet):
            return planned
        share = self.processes.share(self.batch_size)
        moved = torch.zeros_like(planned)
        moved[share] = own - planned[share]
        return planned + self.processes.sum(moved.to(device)).cpu()


def seen(
    view: Callable[[Any, tuple[int, int], Tensor], Tensor],
    numbers: Tensor,
    row: int,
    picture: Any,
    size: tuple[int, int],
) -> Tensor:
    """The view of the picture in one row of a batch, by that row's random numbers."""
    return view(picture, size, numbers[row])


class Reads(Dataset):
    """What `Batches.read` gives of each batch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.batches.read(batch)


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C, and a scheduler's signals, may reach the whole group of processes; the main one decides."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def stream(
    batches: Batches, start: int = 0, workers: int = 0, pin_memory: bool = False, indices: bool = False
) -> Iterator[Any]:
    """Batches number `start`, `start` + 1, ... for ever, made in `workers` processes, or here where that is 0.

    They are (images, labels), and with `indices` (images, labels, indices), see `Batches.read`.
    """
    source = Reads(batches) if indices else batches
    if workers == 0:
        return map(source.__getitem__, itertools.count(start))
    loader: Any = DataLoader(
        source,
        batch_size=None,  # each item is a batch already
        sampler=itertools.count(start),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
        # Its own generator: a loader would draw a seed from the global one, and resuming would draw once more.
        generator=torch.Generator().manual_seed(hash((batches.seed, batches.stream, start)) % 2**63),
    )
    return relayed(loader)


def relayed(loader: DataLoader) -> Iterator[Any]:
    """A worker's error comes with the worker's traceback as its message; its last line is what the error said."""
    batches: Any = iter(loader)
    # At the end of the program, if not before, workers are asked to end: they do not hear the signal that would follow.
    end = weakref.finalize(loader, batches._shutdown_workers)
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None
    finally:
        end()
