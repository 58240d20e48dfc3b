"""What a run starts from: a device and a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from oodkern._errors import brief
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import ImageSet, OODSplit
from oodkern.detector import load
from oodkern.methods import Setting
from oodkern.models import build_model
from oodkern.published import check_size, put, read_weights
from oodkern.training import files


def build_classifier(
    config: TrainConfig, split: OODSplit, weights: bool = True, log: Callable[[str], None] | None = None
) -> Classifier:
    """The model of a configuration, its images normalised by the training images' mean and deviation.

    With `model.weights` by those of the images that the weights were made for, where they are known.

    Args:
        config, split: of the run.
        weights: whether `model.weights` is loaded; false for who goes on with others, or needs the sizes alone.
        log: gets a line that says what was loaded.
    """
    mean, std = statistics(split.train)
    try:
        model = build_model(config.model, len(mean), len(split.classes))
        check_size(config.model, model, split.train.shape[1])
        if weights and config.model.weights:
            mean, std = start_from(model, config, split, (mean, std), log)
        classifier = Classifier(model, mean=mean, std=std)
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from None
    if config.pretrain.checkpoint:
        load_weights(classifier, Path(config.pretrain.checkpoint))
    return classifier


def start_from(
    model: nn.Module,
    config: TrainConfig,
    split: OODSplit,
    own: tuple[list[float], list[float]],
    log: Callable[[str], None] | None,
) -> tuple[list[float], list[float]]:
    """Gives a model the weights of `model.weights`; returns their images' mean and deviation, `own` if not known."""
    with torch.random.fork_rng([]):  # a library may make a second model, at random, to read weights into
        found = read_weights(config.model, model)
    line = f"weights: {config.model.weights}, " + ("head and all" if put(found.state, model) else "with a new head")
    channels, height, _ = split.train.shape
    if found.size is not None and found.size != height:
        line += f"; they were made for {found.size} pixels a side, not {height}"
    if log is not None:
        log(line)
    if found.mean is None or found.std is None:
        return own
    mean, std = (
        list(values) if len(values) == channels else [sum(values) / len(values)] * channels
        for values in (found.mean, found.std)
    )
    return mean, std


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
    detector = load(path, device=device)
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
