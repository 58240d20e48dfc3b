"""A trained model at work: class, score and verdict of new images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig, load_config
from oodkern.data.images import read_image
from oodkern.methods import METHODS
from oodkern.models import build_model
from oodkern.training.evaluation import predicted
from oodkern.training.folder import read_checkpoint
from oodkern.training.start import find_device


class Prediction(NamedTuple):
    """label [N] int64, the likeliest class (multi-label: [N, K] bool); score [N], larger = more OOD; is_ood [N]."""

    label: Tensor
    score: Tensor
    is_ood: Tensor


class Detector:
    """The model, score and threshold of a checkpoint.

    `predict(images [N, C, H, W] in [0, 1])` gives a Prediction, on the images' device; `classes` names the labels;
    `threshold` accepts 95 % of the ID validation images. `read(path)` makes of an image file what the model was
    trained on.
    """

    def __init__(self, config: TrainConfig, state: dict) -> None:
        self.config = config
        self.classes: tuple[str, ...] = tuple(state["classes"])
        self.shape: tuple[int, int, int] = tuple(state["shape"])
        self.threshold: float = state["threshold"]
        self.epoch: int = state["epoch"]
        self.stage: str = state["stage"]
        self.method = METHODS[config.method](config.loss, state["multi_label"])
        channels = self.shape[0]
        self.model = Classifier(
            build_model(config.model, channels, len(self.classes)), mean=(0.0,) * channels, std=(1.0,) * channels
        )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # the configuration was edited since
            raise ConfigError(f"model: not the one of the checkpoint ({brief(error)})") from None
        self.model.eval()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images: expected [N, {', '.join(map(str, self.shape))}], got {list(images.shape)}")
        weight = self.model.head.weight
        outputs = self.model.outputs(images.to(weight.device))
        score = self.method.score(outputs, weight).to(images.device)
        label = predicted(outputs.logits, self.method.multi_label).to(images.device)
        return Prediction(label, score, score > self.threshold)

    def read(self, path: Path) -> Tensor:
        """[C, H, W] of an image file. Raises DataError with its path where it is none."""
        channels, height, _ = self.shape
        return read_image(path, channels, height)


def load_run(folder: Path | str, checkpoint: str = "last", device: str | torch.device = "cpu") -> Detector:
    """The Detector of a run folder, from its last or its best checkpoint, its model on `device` (`auto`: a GPU where
    there is one), whatever the run was trained on. Raises ConfigError with what is missing.
    """
    folder, device = Path(folder), find_device(device)
    if checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint: expected last or best, got {checkpoint!r}")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: expected the folder of a run, with a config.yaml")
    state = read_checkpoint(folder / f"{checkpoint}.ckpt")
    if not math.isfinite(state["threshold"]):
        best = ", or take --checkpoint best" if (folder / "best.ckpt").is_file() else ""
        raise ConfigError(
            f"{folder / checkpoint}.ckpt: the run stopped within an epoch, before its model was validated; go on with "
            f"it by `oodkern train ... --resume`{best}"
        )
    detector = Detector(load_config(str(folder / "config.yaml")), state)
    detector.model.to(device)
    return detector
