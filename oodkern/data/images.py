"""Sets of images of one shape, in memory, in files, or behind any data set of `(image, label)` samples."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from oodkern.data.damage import Damage
from oodkern.data.pictures import DataError, as_tensor, fitted, open_picture, read_image

__all__ = ["ArraySet", "DataError", "FileSet", "FolderSet", "ImageSet", "SampleSet", "image_files", "read_image"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
UNKNOWN = -1


# What makes [C, *size] of a picture: of its row among those asked for, of the Pillow image of a file as it is or of
# [C, H, W] in memory, and of the size (H, W).
View = Callable[[int, Any, tuple[int, int]], Tensor]


class ImageSet(Dataset):
    """Images that are read batch by batch; `dataset[i]` is `(image [C, H, W] float32 in [0, 1], label)`.

    `labels` are [N] int64, -1 for outliers, or [N, K] of 0 and 1 in multi-label sets; `classes` names the K classes.

    A set in files may hold some that cannot be read. In place of one `read` and `images` take the next of the set that
    can be, in the order of indices and beginning anew after the last: a function of what is on disk alone, whoever
    reads, so that batches keep their size and runs repeat. `read` tells which images they are, and labels go by that.
    `readable` leaves such images out: numbers that an evaluation forms are of images that are there. Each such file is
    counted once, and past one in 1,000 (see `Damage`) all three raise DataError; also where no file is readable.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, indices = self.read(torch.tensor([index]))
        return images[0], self.labels[indices[0]]

    def images(self, indices: Tensor) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1] of indices [B], or of others in place of unreadable ones."""
        raise NotImplementedError

    def read(self, indices: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        """`images(indices)`, made by a view where one is given, and the indices [B] of what they show."""
        images = self.images(indices)
        if view is not None:
            size = (images.shape[2], images.shape[3])
            images = torch.stack([view(row, image, size) for row, image in enumerate(images)])
        return images, indices

    def readable(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [n, C, H, W] of those of indices [B] that can be read, and their indices [n]."""
        return self.images(indices), indices

    def identities(self) -> Iterable[Hashable]:
        """Of each image what tells it from others, wherever it is read again; nothing where that is not known."""
        return []

    def select(self, indices: Tensor) -> ImageSet:
        """The samples of indices [M], in their order."""
        raise NotImplementedError

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> ImageSet:
        """The same images under other labels."""
        raise NotImplementedError

    def as_outliers(self) -> ImageSet:
        return self.relabelled(torch.full((len(self),), UNKNOWN), ())

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        channels, height, width = self.images(torch.tensor([0])).shape[1:]
        return channels, height, width


class ArraySet(ImageSet):
    """Images in memory, [N, C, H, W], as uint8 (read as fractions of 255) or as float32 in [0, 1]."""

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str] = ()) -> None:
        if images.dim() != 4 or images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"images: expected uint8 or float32 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if len(labels) != len(images):
            raise ValueError(f"labels: expected {len(images)}, one for each image, got {len(labels)}")
        self.array, self.labels, self.classes = images, labels, tuple(classes)

    def images(self, indices: Tensor) -> Tensor:
        chosen = self.array[indices]
        return chosen / 255 if chosen.dtype == torch.uint8 else chosen

    def identities(self) -> list[Hashable]:
        """Of the pixels."""
        return [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in self.array.numpy()]

    def select(self, indices: Tensor) -> ArraySet:
        return ArraySet(self.array[indices], self.labels[indices], self.classes)

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> ArraySet:
        return ArraySet(self.array, labels, classes)


class FileSet(ImageSet):
    """Image files, decoded when they are read, as `channels` (1 grey, 3 colour) and made `size` x `size` by `resize`.

    See `fitted` of `oodkern.data.pictures`. `numbers` [M] int64 are those of its files in the set as it was opened,
    which has a `damage`; it and all sets made of it share that.
    """

    numbers: np.ndarray
    damage: Damage
    channels: int
    size: int
    resize: str

    def name(self, index: int) -> str:
        """Where an image is, for people."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The bytes of an image's file. Raises DataError."""
        raise NotImplementedError

    def picture(self, index: int) -> Any:
        """An image as Pillow decodes it. Raises DataError."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def images(self, indices: Tensor) -> Tensor:
        return self.read(indices)[0]

    def read(self, indices: Tensor, view: View | None = None) -> tuple[Tensor, Tensor]:
        images, found = [], []
        for row, index in enumerate(indices.tolist()):
            picture, there = self._next_readable(index)
            images.append(self._made(picture) if view is None else view(row, picture, (self.size, self.size)))
            found.append(there)
        return torch.stack(images), torch.tensor(found, dtype=torch.int64)

    def readable(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, found = [torch.empty(0, *self.shape)], []
        for index in indices.tolist():
            try:
                picture = self.picture(index)
            except DataError:
                self.damage.note(int(self.numbers[index]))
                continue
            images.append(self._made(picture)[None])
            found.append(index)
        return torch.cat(images), torch.tensor(found, dtype=torch.int64)

    def _made(self, picture: Any) -> Tensor:
        return as_tensor(fitted(picture, self.size, self.resize))

    def _next_readable(self, index: int) -> tuple[Any, int]:
        first: DataError | None = None
        for step in range(len(self)):
            there = (index + step) % len(self)
            try:
                return self.picture(there), there
            except DataError as error:
                first = first or error
                self.damage.note(int(self.numbers[there]))
        raise first or IndexError(f"index: expected one of {len(self)} images, got {index}")


class FolderSet(FileSet):
    """Image files by their paths."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        classes: Sequence[str] = (),
        channels: int = 3,
        size: int = 32,
        resize: str = "stretch",
    ) -> None:
        self.paths, self.labels, self.classes = tuple(paths), labels, tuple(classes)
        self.channels, self.size, self.resize = channels, size, resize
        self.numbers = np.arange(len(self.paths))
        self.damage = Damage(len(self.paths), self.name, self.picture)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise DataError(f"{self.paths[index]}: {error.strerror}") from None

    def picture(self, index: int) -> Any:
        return open_picture(self.paths[index], self.channels, self.name(index))

    def identities(self) -> list[Hashable]:
        """Real paths. A folder is resolved once for all of its files: a third of the time that each file takes."""
        real: dict[Path, str] = {}
        for folder in {path.parent for path in self.paths}:
            real[folder] = os.path.realpath(folder)
        return [
            os.path.realpath(path) if os.path.islink(path) else os.path.join(real[path.parent], path.name)
            for path in self.paths
        ]

    def select(self, indices: Tensor) -> FolderSet:
        chosen = [self.paths[i] for i in indices.tolist()]
        return self._of(chosen, self.numbers[indices.numpy()], self.labels[indices], self.classes)

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> FolderSet:
        return self._of(self.paths, self.numbers, labels, classes)

    def _of(self, paths: Sequence[Path], numbers: np.ndarray, labels: Tensor, classes: Sequence[str]) -> FolderSet:
        made = copy.copy(self)
        made.paths, made.numbers, made.labels, made.classes = tuple(paths), numbers, labels, tuple(classes)
        return made


class SampleSet(ImageSet):
    """Any map-style data set of `(image, label)`, such as torchvision's with a transform to tensors in [0, 1].

    Labels are taken from its `targets` where it has them, and by reading every sample otherwise. A transform that draws
    random numbers of its own is outside of what makes a run repeat; `oodkern.data.augmentation` is inside.
    """

    def __init__(self, dataset: Any, classes: Sequence[str] = (), labels: Tensor | None = None) -> None:
        self.dataset = dataset
        if labels is None:
            found = getattr(dataset, "targets", None)
            labels = torch.as_tensor(
                np.asarray(found) if found is not None else np.asarray([dataset[i][1] for i in range(len(dataset))])
            ).long()
        self.labels, self.classes = labels, tuple(classes or getattr(dataset, "classes", ()))

    def images(self, indices: Tensor) -> Tensor:
        return torch.stack([self.dataset[i][0] for i in indices.tolist()])

    def select(self, indices: Tensor) -> SampleSet:
        subset = torch.utils.data.Subset(self.dataset, indices.tolist())
        return SampleSet(subset, self.classes, self.labels[indices])

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> SampleSet:
        return SampleSet(self.dataset, classes, labels)


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted by path: links are followed, names that begin with a dot are left out."""
    found, visited = [], set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(inside)) in visited:  # a link to a folder above it
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inside, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())
