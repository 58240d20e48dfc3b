"""Variety for few outliers."""

from __future__ import annotations

import torch
from torch import Tensor


def vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random quarter turns, inversion and contrast of images [N, C, H, W] in [0, 1] with H = W.

    Two classes of digits are a narrow picture of the unknown: trained with them alone, the energy separates
    photographs worse than before (`oodkern train data.outlier_augmentation=false` shows it). Never a half turn: it
    makes nines of sixes, and nines are what the embedded data set tests on.
    """

    def chance(probability: float) -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator) < probability

    turn = torch.rand(len(images), 1, 1, 1, generator=generator)
    left, right = images.rot90(1, (2, 3)), images.rot90(-1, (2, 3))
    turned = torch.where(turn < 1 / 3, left, torch.where(turn < 2 / 3, right, images))
    turned = torch.where(chance(0.3), 1 - turned, turned)
    contrast, shift = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    return torch.where(chance(0.5), turned * contrast + shift * (1 - contrast), turned)
