"""What a run starts from: a device and a model."""

from __future__ import annotations

from pathlib import Path

import torch

from oodkern._errors import brief
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig, check_device
from oodkern.data import ImageSet, OODSplit
from oodkern.methods import Setting
from oodkern.models import build_model
from oodkern.training import files


def find_device(name: str | torch.device) -> torch.device:
    """`auto`, cpu, cuda or cuda:N, or a device. Raises ConfigError where it is none of this machine."""
    if isinstance(name, str):
        check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name}")
    return device


def build_classifier(config: TrainConfig, split: OODSplit) -> Classifier:
    """The model of a configuration, its images normalised by the training images' mean and deviation."""
    mean, std = statistics(split.train)
    try:
        model = build_model(config.model, len(mean), len(split.classes))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    classifier = Classifier(model, mean=mean, std=std)
    if config.pretrain.checkpoint:
        load_weights(classifier, Path(config.pretrain.checkpoint))
    return classifier


def setting_of(config: TrainConfig, split: OODSplit, baseline: Classifier, device: torch.device) -> Setting:
    """What the method's stage begins with."""
    return Setting(
        model=baseline.eval().requires_grad_(False),
        split=split,
        batch_size=config.optimizer.batch_size,
        outlier_batch_size=config.optimizer.outlier_batch_size,
        seed=config.seed,
        load_classifier=lambda path: load_classifier(path, split, device),
    )


def load_classifier(path: str, split: OODSplit, device: torch.device) -> Classifier:
    """The model of a run folder, in evaluation mode and without gradients. Raises ConfigError."""
    from oodkern.training.detector import load_run

    detector = load_run(path, device=device)
    if detector.classes != split.classes or detector.shape != split.train.shape:
        raise ConfigError(
            f"{path}: expected a run on the classes {', '.join(split.classes)} at {split.train.shape}, got "
            f"{', '.join(detector.classes)} at {detector.shape}"
        )
    return detector.model.eval().requires_grad_(False)


def statistics(images: ImageSet, limit: int = 2000, batch_size: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of `limit` images evenly spaced."""
    count = min(limit, len(images))
    total = square = torch.zeros((), dtype=torch.float64)
    for indices in (torch.arange(count) * len(images) // count).split(batch_size):
        pixels = images.images(indices).double()
        share = len(pixels) / count
        total, square = total + share * pixels.mean((0, 2, 3)), square + share * pixels.square().mean((0, 2, 3))
    return total.tolist(), (square - total.square()).clamp_min(0).sqrt().clamp_min(1e-3).tolist()


def load_weights(classifier: Classifier, path: Path) -> None:
    """Starts from the baseline of a run's checkpoint, or from a state_dict of the model itself."""
    try:
        state = files.load_checkpoint(path)
        if "format" in state:
            classifier.load_state_dict(state.get("baseline") or state["model"])
        else:
            classifier.model.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # whatever a damaged or a foreign file raises
        raise ConfigError(f"pretrain.checkpoint: {path}: {brief(error)}") from None
