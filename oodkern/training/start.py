"""What a run starts from: a device and a model."""

from __future__ import annotations

from pathlib import Path

import torch

from oodkern._errors import brief
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import OODSplit
from oodkern.models import build_model
from oodkern.training import files
from oodkern.training.evaluation import SAMPLE


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name}")
    return device


def build_classifier(config: TrainConfig, split: OODSplit) -> Classifier:
    """The model of a configuration, its images normalised by the training images' mean and deviation."""
    sample = split.train.images(torch.arange(0, len(split.train), max(len(split.train) // SAMPLE, 1)))
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    try:
        model = build_model(config.model, sample.shape[1], len(split.classes))
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    classifier = Classifier(model, mean=mean.tolist(), std=std.tolist())
    if config.pretrain.checkpoint:
        load_weights(classifier, Path(config.pretrain.checkpoint))
    return classifier


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
