"""Augmentations of torchvision v2, whose random numbers are made functions of those that `random_numbers` gives.

They need `pip install 'oodkern[vision]'`; nothing here is imported before one is applied.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUMBERS = 2  # of 24 bits: the seed of a sample's draws
EXTRA = "needs torchvision, which is not installed: pip install 'oodkern[vision]'"


def installed() -> bool:
    """Whether torchvision is there, without the second that importing it takes."""
    return importlib.util.find_spec("torchvision") is not None


def transforms() -> Any:
    """`torchvision.transforms.v2`. Raises ImportError with what to install."""
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise ImportError(EXTRA) from None
    return v2


def seeded(transform: Callable[[Any], Any], picture: Any, random: Tensor) -> Any:
    """A transform of one picture that draws from PyTorch's generator, as a function of two numbers in [0, 1).

    Its draws begin at the seed of 48 bits that they make, and the generator is left as it was. Never by
    `torch.manual_seed`, which would seed those of all GPUs too.
    """
    high, low = (random.double() * 2**24).long().tolist()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(high << 24 | low)
        return transform(picture)


@functools.lru_cache(maxsize=8)
def resized_crop_to(size: tuple[int, int]) -> Callable[[Any], Any]:
    return transforms().RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)


@functools.lru_cache(maxsize=8)
def built(name: str) -> Callable[[Any], Any]:
    v2 = transforms()
    if name == "jitter":
        return v2.ColorJitter(0.4, 0.4, 0.4)
    return {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[name]()


def resized_crop(picture: Any, size: tuple[int, int], random: Tensor) -> Tensor:
    """8 % to all of a picture, of 3:4 to 4:3, as [C, *size] float32 in [0, 1]: v2.RandomResizedCrop.

    Of a Pillow image as it is in its file, or of [C, H, W] in [0, 1]; `random` is [2].
    """
    from oodkern.data.pictures import as_tensor

    found = seeded(resized_crop_to(size), picture, random)
    return found if isinstance(found, Tensor) else as_tensor(found)


def of_each(images: Tensor, random: Tensor, name: str) -> Tensor:
    """TrivialAugmentWide, RandAugment or ColorJitter(0.4, 0.4, 0.4) of images [B, C, H, W]; `random` is [B, 2].

    The first two are of 8 bits a channel, as published: they round to 255ths.
    """
    transform = built(name)
    if name == "jitter":
        return torch.stack([seeded(transform, image, row) for image, row in zip(images, random, strict=True)])
    bytes_ = (images * 255).round().clamp(0, 255).byte()
    return torch.stack([seeded(transform, image, row) for image, row in zip(bytes_, random, strict=True)]) / 255
