"""Classifiers for small images. Any other `nn.Module` serves as well: see `oodkern.classifier.Classifier`.

Each speaks timm's protocol: `forward_features(images)` gives the last feature map, `forward_head(map,
pre_logits=True)` the penultimate features [N, D], `get_classifier()` the linear head that makes logits of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from oodkern import published
from oodkern._options import option


@dataclass
class ModelConfig:
    """What is trained."""

    name: str = option("small_cnn", "small_cnn, wrn_40, resnet18, timm:NAME or torchvision:NAME")
    width: int = option(0, "0: the model's own (small_cnn 32 channels, wrn_40 2 times 16, resnet18 64)")
    dropout: float = option(0.0, "of the features; in wrn_40 in every block")
    weights: str = option(
        "", "to start from: a file (.pth, .safetensors), default, or timm's or torchvision's name; empty: random"
    )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")


class ImageClassifier(nn.Module):
    """A backbone that makes feature maps, their mean over the image, dropout, and a linear head `fc`."""

    def __init__(self, backbone: nn.Module, features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.backbone = backbone
        self.fc = nn.Linear(features, num_classes)
        self.dropout = dropout

    def get_classifier(self) -> nn.Linear:
        return self.fc

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map [N, D, h, w] of images [N, C, H, W]."""
        return self.backbone(images)

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [N, K] of a feature map, or with `pre_logits` the features [N, D] that the head sees."""
        features = dropout(maps.mean((-2, -1)), self.dropout, self.training)
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class SmallCNN(ImageClassifier):
    """Three 3x3 convolutions with BatchNorm, one pooling, and a linear head: for images of 8x8 pixels and up.

    Args:
        in_channels: channels of the images.
        num_classes: K.
        width: channels of the first two convolutions; the third, and the features, have twice as many.
        dropout: of the features.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32, dropout: float = 0.0) -> None:
        check_positive(in_channels=in_channels, width=width)

        def block(channels: int, outputs: int) -> list[nn.Module]:
            return [conv(channels, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]

        backbone = nn.Sequential(
            *block(in_channels, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2 * width)
        )
        super().__init__(backbone, 2 * width, num_classes, dropout)


def conv(channels: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, size, stride, padding=size // 2, bias=False)


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice, dropout between, added to the input: the block of wide residual networks."""

    def __init__(self, channels: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(channels, outputs, stride, size=1) if channels != outputs else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        out = self.conv1(active)
        out = self.conv2(dropout(relu(self.bn2(out)), self.dropout, self.training))
        # Where the shape changes the shortcut, too, starts from the normalised input.
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(ImageClassifier):
    """WRN-`depth`-`widen`, depth = 6n + 4: three groups of n blocks of 16, 32 and 64 times `widen` channels.

    WRN-40-2 (the default, 2.2 million parameters) is the network of most OOD papers on CIFAR.
    Source: Zagoruyko, Komodakis, Wide Residual Networks, BMVC 2016.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, depth: int = 40, widen: int = 2, dropout: float = 0.0
    ) -> None:
        check_positive(in_channels=in_channels, widen=widen)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: expected 6n + 4 such as 16, 28, 40, got {depth}")
        channels = 16
        blocks: list[nn.Module] = [conv(in_channels, channels)]
        for group, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for i in range((depth - 4) // 6):
                stride = 2 if group > 0 and i == 0 else 1
                blocks.append(PreActivationBlock(channels, outputs, stride, dropout))
                channels = outputs
        backbone = nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.ReLU())
        super().__init__(backbone, channels, num_classes)
        initialise(self)


class BasicBlock(nn.Module):
    """Conv-BN-ReLU-conv-BN, added to the input, ReLU."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != outputs:
            self.shortcut = nn.Sequential(conv(channels, outputs, stride, size=1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(ImageClassifier):
    """ResNet-18 with the stem for small images: one 3x3 convolution, no pooling (11.2 million parameters).

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016; the stem as OpenOOD has it for CIFAR.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 64, dropout: float = 0.0) -> None:
        check_positive(in_channels=in_channels, width=width)
        channels = width
        blocks: list[nn.Module] = [conv(in_channels, width), nn.BatchNorm2d(width), nn.ReLU()]
        for group in range(4):
            for i in range(2):
                outputs, stride = width << group, 2 if group > 0 and i == 0 else 1
                blocks.append(BasicBlock(channels, outputs, stride))
                channels = outputs
        super().__init__(nn.Sequential(*blocks), channels, num_classes, dropout)
        initialise(self)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """He's normal initialisation of the convolutions by their outputs, as in torchvision; zero bias of the head."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            module.bias.zero_()


MODELS: dict[str, tuple[Callable[..., ImageClassifier], str]] = {
    "small_cnn": (SmallCNN, "width"),
    "wrn_40": (WideResNet, "widen"),
    "resnet18": (ResNet18, "width"),
}


def build_model(options: ModelConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The model of a configuration, its weights random whatever `weights` says.

    Raises ValueError naming the key, ImportError saying what to install for timm and torchvision.
    """
    check_model(options)
    if published.library_of(options.name):
        return published.build(options, in_channels, num_classes)
    make, width = MODELS[options.name]
    own = {width: options.width} if options.width else {}
    return make(in_channels, num_classes, dropout=options.dropout, **own)


def check_model(options: ModelConfig) -> None:
    library = published.library_of(options.name)
    if options.name not in MODELS and not library:
        raise ValueError(
            f"model.name: expected one of {', '.join(MODELS)}, timm:NAME or torchvision:NAME, got {options.name!r}"
        )
    if options.width < 0:
        raise ValueError(f"model.width: expected 0 (the model's own) or a positive number, got {options.width}")
    if options.width and library:
        raise ValueError(f"model.width: {library}'s models have their own; expected 0, got {options.width}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"model.dropout: expected a probability in [0, 1), got {options.dropout}")
    if options.dropout and library == "torchvision":
        raise ValueError(f"model.dropout: torchvision's models have their own; expected 0, got {options.dropout}")
    if options.weights and not library and not published.is_file(options.weights):
        raise ValueError(f"model.weights: expected a file for {options.name}, got {options.weights!r}")
