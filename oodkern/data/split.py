"""What a data set for OOD detection consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OODSplit:
    """ID images to train and to test on, outliers to train with, and OOD images that training never sees.

    Images are [N, C, H, W] float32, labels [N] int64. `test_ood` maps a name ("near", "far") to images.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    outliers: Tensor
    test_ood: Mapping[str, Tensor]
    num_classes: int

    def describe(self) -> str:
        ood = ", ".join(f"{len(images):,} {name}" for name, images in self.test_ood.items())
        return (
            f"{self.name}: {len(self.train_images):,} training and {len(self.test_images):,} test images of "
            f"{self.num_classes} classes; {len(self.outliers):,} outliers; test OOD {ood}"
        )
