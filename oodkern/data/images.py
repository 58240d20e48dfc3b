"""Sets of images of one shape, in memory, in folders, or behind any data set of `(image, label)` samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from oodkern._errors import brief

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
UNKNOWN = -1


class DataError(Exception):
    """What is wrong with a data set on disk, in one line that names the file."""


class ImageSet(Dataset):
    """Images that are read batch by batch; `dataset[i]` is `(image [C, H, W] float32 in [0, 1], label)`.

    `labels` are [N] int64, -1 for outliers, or [N, K] of 0 and 1 in multi-label sets; `classes` names the K classes.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images(torch.tensor([index]))[0], self.labels[index]

    def images(self, indices: Tensor) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1] of indices [B]."""
        raise NotImplementedError

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

    def select(self, indices: Tensor) -> ArraySet:
        return ArraySet(self.array[indices], self.labels[indices], self.classes)

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> ArraySet:
        return ArraySet(self.array, labels, classes)


class FolderSet(ImageSet):
    """Image files, decoded when they are read, as `channels` (1 grey, 3 colour) and resized to `size` x `size`."""

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, classes: Sequence[str] = (), channels: int = 3, size: int = 32
    ) -> None:
        self.paths, self.labels, self.classes = tuple(paths), labels, tuple(classes)
        self.channels, self.size = channels, size

    def images(self, indices: Tensor) -> Tensor:
        return torch.stack([read_image(self.paths[i], self.channels, self.size) for i in indices.tolist()])

    def select(self, indices: Tensor) -> FolderSet:
        chosen = [self.paths[i] for i in indices.tolist()]
        return FolderSet(chosen, self.labels[indices], self.classes, self.channels, self.size)

    def relabelled(self, labels: Tensor, classes: Sequence[str]) -> FolderSet:
        return FolderSet(self.paths, labels, classes, self.channels, self.size)


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


def read_image(path: Path, channels: int, size: int) -> Tensor:
    """An image file as [channels, size, size] float32 in [0, 1]; transparency is ignored.

    Raises DataError with the path where it is none.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # as cameras mean it to be seen
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.mode == "F":
                raise DataError(f"{path}: expected 8 or 16 bits a pixel, got floating-point numbers")
            image = image.convert("L" if channels == 1 else "RGB")
    except DataError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to spell
        raise DataError(f"{path}: not a readable image ({brief(error)})") from None
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).reshape(size, size, -1)
    return pixels.permute(2, 0, 1).float() / 255


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
