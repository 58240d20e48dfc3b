"""A trained model at work: class, score and verdict of new images. Nothing of `oodkern.training` is needed for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oodkern._errors import brief
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig, check_device, load_config
from oodkern.data.pictures import read_image
from oodkern.methods import METHODS
from oodkern.models import build_model

if TYPE_CHECKING:
    from oodkern.export import Exported

FORMAT = 1  # of the checkpoints


class Prediction(NamedTuple):
    """label [N] int64, the likeliest class (multi-label: [N, K] bool); score [N], larger = more OOD; is_ood [N]."""

    label: Tensor
    score: Tensor
    is_ood: Tensor


class Detector:
    """The model, score and threshold of a checkpoint.

    `predict(images [N, C, H, W] in [0, 1])` gives a Prediction, on the images' device; `classes` names the labels;
    `threshold` accepts 95 % of the ID validation images. `read(path)` makes of an image file what the model was
    trained on. `export(path)` writes all of it as one file that runs without this library.
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
        try:
            model = build_model(config.model, channels, len(self.classes))
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None
        self.model = Classifier(model, mean=(0.0,) * channels, std=(1.0,) * channels)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # the configuration was edited since
            raise ConfigError(f"model: not the one of the checkpoint ({brief(error)})") from None
        self.model.eval()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        if images.dim() != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images: expected [N, {', '.join(map(str, self.shape))}], got {list(images.shape)}")
        found = self.judge(images.to(self.model.head.weight.device))
        return Prediction(*(one.to(images.device) for one in found))

    def judge(self, images: Tensor) -> Prediction:
        """What `predict` gives, of images on the model's device: the graph that is exported."""
        outputs = self.model.outputs(images)
        score = self.method.score(outputs, self.model.head.weight)
        return Prediction(predicted(outputs.logits, self.method.multi_label), score, score > self.threshold)

    def read(self, path: Path) -> Tensor:
        """[C, H, W] of an image file. Raises DataError with its path where it is none."""
        channels, height, _ = self.shape
        return read_image(path, channels, height, self.config.data.resize)

    def export(self, path: Path | str, opset: int | None = None) -> Exported:
        """Writes it as a .pt2 or .onnx file: see `oodkern.export.export`."""
        from oodkern.export import export

        return export(self, path, opset)


def load(folder: Path | str, checkpoint: str = "last", device: str | torch.device = "cpu") -> Detector:
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of a run. Raises ConfigError with its path where it is none."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected a run with a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to spell
        raise ConfigError(f"{path}: not a readable checkpoint ({brief(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"{path}: expected a checkpoint of format {FORMAT}, got {found}")
    return state


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


def predicted(logits: Tensor, multi_label: bool) -> Tensor:
    """The likeliest class [N] int64; of a multi-label classifier the labels likelier than not, [N, K] bool."""
    return logits > 0 if multi_label else logits.argmax(-1)


def name_of(label: int | list[bool], classes: Sequence[str]) -> str:
    """One row of `predicted(...).tolist()` in words: a class, or labels joined by +."""
    if isinstance(label, list):
        return "+".join(name for name, there in zip(classes, label, strict=True) if there) or "none"
    return classes[label]
