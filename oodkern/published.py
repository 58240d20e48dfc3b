"""Models of timm and torchvision, and weights that a model was published with: from a file, or by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from oodkern._errors import brief
from oodkern.classifier import find_head

if TYPE_CHECKING:
    from oodkern.models import ModelConfig

LIBRARIES = ("timm", "torchvision")
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of ImageNet's pixels in [0, 1]
# Networks with further heads in training, whose logits would come along as a tuple, and how their parameters begin.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


class Weights(NamedTuple):
    """Tensors by name, and of the images they were made for mean, deviation and pixels a side (None: unknown)."""

    state: Mapping[str, Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    size: int | None


def library_of(name: str) -> str:
    """timm or torchvision, whose the model of that name is; "" for one of `oodkern.models`."""
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in LIBRARIES else ""


def imported(library: str, name: str) -> Any:
    """The library. Raises ImportError, naming the key and what to install."""
    try:
        if library == "timm":
            import timm

            return timm
        from torchvision import models

        return models
    except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch raises RuntimeError
        raise ImportError(f"model.name: {name} needs {library} ({error}): pip install 'oodkern[vision]'") from error


def build(options: ModelConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The model of a library with random weights. Raises ValueError naming the key, ImportError."""
    library, name = library_of(options.name), options.name.partition(":")[2]
    found = imported(library, options.name)
    if library == "timm":
        if not found.is_model(name):
            raise ValueError(f"model.name: timm has no model {name!r}")
        try:
            return found.create_model(name, in_chans=in_channels, num_classes=num_classes, drop_rate=options.dropout)
        except RuntimeError as error:  # of a tag that the model does not have
            raise ValueError(f"model.name: {options.name}: {error}") from None
    if name not in found.list_models(module=found):
        raise ValueError(f"model.name: torchvision has no classifier {name!r}")
    if in_channels != 3:
        raise ValueError(
            f"model.name: torchvision's models take 3 channels, and the images have {in_channels}; expected "
            "data.channels=3, or a model of timm"
        )
    own = {}
    if name in AUXILIARY:  # their published weights expect pixels between -1 and 1
        own = {"aux_logits": False, "init_weights": True, "transform_input": bool(options.weights)}
    return found.get_model(name, weights=None, num_classes=num_classes, **own)


def is_file(weights: str) -> bool:
    """Whether `model.weights` is a file's name, and not that of published weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or Path(weights).is_file()


def read_weights(options: ModelConfig, model: nn.Module) -> Weights:
    """The weights that `options.weights` names, for a model that `build_model` made.

    Raises ValueError, naming the key, where there are none of that name, or no network to fetch them by; ImportError.
    """
    library, name = library_of(options.name), options.name.partition(":")[2]
    further = AUXILIARY.get(name, ()) if library == "torchvision" else ()
    if is_file(options.weights):
        state = without(further, read_state(Path(options.weights).expanduser()))
        if library == "timm":
            known: Any = getattr(model, "pretrained_cfg", None) or {}
            return Weights(state, known.get("mean"), known.get("std"), (known.get("input_size") or (None,))[-1])
        mean, std = IMAGENET if library else (None, None)
        return Weights(state, mean, std, None)
    if library == "timm":
        return of_timm(imported(library, options.name), name, options)
    weights = of_torchvision(imported(library, options.name), name, options)
    return weights._replace(state=without(further, weights.state))


def without(beginnings: tuple[str, ...], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(beginnings)}


def check_size(options: ModelConfig, model: nn.Module, size: int) -> None:
    """Raises ValueError for images that a transformer with positions for one size does not take."""
    patches: Any = getattr(model, "patch_embed", None)
    fixed = getattr(model, "image_size", None)
    if fixed is None and getattr(patches, "strict_img_size", False):
        fixed = patches.img_size[0] if patches.img_size else None
    if fixed is not None and fixed != size:
        raise ValueError(f"data.size: {options.name} takes images of {fixed} pixels, got {size}")


def of_timm(timm: Any, name: str, options: ModelConfig) -> Weights:
    if options.weights != "default":
        name = f"{name.partition('.')[0]}.{options.weights}"
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of whatever fetches it
        raise not_fetched(options, error) from None
    known = model.pretrained_cfg
    return Weights(model.state_dict(), known["mean"], known["std"], known["input_size"][-1])


def of_torchvision(models: Any, name: str, options: ModelConfig) -> Weights:
    known = models.get_model_weights(name)
    if options.weights != "default" and options.weights not in known.__members__:
        raise ValueError(
            f"model.weights: expected a file, default or one of {', '.join(known.__members__)} for {options.name}, got "
            f"{options.weights!r}"
        )
    chosen = known.DEFAULT if options.weights == "default" else known[options.weights]
    transforms = chosen.transforms()
    try:
        state = chosen.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise not_fetched(options, error, chosen.url) from None
    return Weights(state, tuple(transforms.mean), tuple(transforms.std), transforms.crop_size[0])


def not_fetched(options: ModelConfig, error: Exception, url: str = "") -> ValueError:
    return ValueError(
        f"model.weights: {options.weights} of {options.name} could not be fetched ({brief(error)}); fetch "
        f"{url or 'it'} elsewhere and give the file, model.weights=FILE"
    )


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The state dict of a file, `.safetensors` or of torch.save, itself or as its "state_dict" or "model"."""
    if not path.is_file():
        raise ValueError(f"model.weights: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"model.weights: {path} needs safetensors ({error}): pip install safetensors") from None
    except Exception as error:  # whatever a damaged or a foreign file raises
        raise ValueError(f"model.weights: {path}: {brief(error)}") from None
    if isinstance(state, dict) and "format" in state:
        raise ValueError(f"model.weights: {path} is a run's; expected pretrain.checkpoint={path}")
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(one, Tensor) for one in state.values()):
        raise ValueError(f"model.weights: {path}: expected a state_dict, names with tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def put(weights: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Gives a model its weights; returns whether its head is among them.

    A head of another number of classes, or none, is left as it is. Raises ValueError for names and shapes that do not
    fit otherwise.
    """
    own, head = model.state_dict(), find_head(model)
    # DenseNet's published weights have names from before submodules could not have dots: norm.1 is norm1.
    state = {key if key in own else re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): weights[key] for key in weights}
    layer = [name for name in (f"{head}.weight", f"{head}.bias") if name in own]
    complete = all(name in state and state[name].shape == own[name].shape for name in layer)
    if not complete:
        state = {key: value for key, value in state.items() if key not in layer}
    missing = [key for key in own if key not in state and key not in layer and "num_batches_tracked" not in key]
    foreign = [key for key in state if key not in own]
    other = [
        f"{k} {list(v.shape)}, not {list(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    for what, keys in (("lack", missing), ("have besides", foreign), ("have other shapes", other)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"model.weights: they are of another model; they {what} {', '.join(keys[:3])}{more}")
    model.load_state_dict(state, strict=False)
    return complete
