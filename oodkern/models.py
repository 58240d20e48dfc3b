"""Classifiers for small images."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, one pooling, and a linear head: for images of 8x8 pixels and up.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first two convolutions; the third, and the features, have twice as many.

    `model(images)` gives logits [N, K], `model.features(images)` the penultimate features [N, 2 * width], and
    `model.fc` is the head that maps one to the other.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        for value, name in ((in_channels, "in_channels"), (num_classes, "num_classes"), (width, "width")):
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")

        def block(channels: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.backbone = nn.Sequential(
            *block(in_channels, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2 * width)
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.backbone(images).mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))
