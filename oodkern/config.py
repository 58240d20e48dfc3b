"""The configuration of a run: dataclasses, a YAML file, and `key=value` from the command line.

`method` is read first, then the schema is built around that method's own options, so that an unknown or mistyped
key is an error at once, with the nearest key that exists.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

from oodkern.methods import METHODS


class ConfigError(Exception):
    """What is wrong with a configuration, in one line for the person who wrote it."""


@dataclass
class DataConfig:
    name: str = "digits"  # the embedded set
    outlier_augmentation: bool = True


@dataclass
class ModelConfig:
    width: int = 32


@dataclass
class PretrainConfig:
    """The baseline: plain training on the ID images."""

    epochs: int = 20
    lr: float = 0.05


@dataclass
class OptimizerConfig:
    """SGD with Nesterov momentum and a cosine schedule to zero, for pretraining and fine-tuning alike."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    outlier_batch_size: int = 128


@dataclass
class TrainConfig:
    method: str = "energy"
    epochs: int = 10
    seed: int = 0
    name: str = ""  # of the run folder; empty: the method and the seed
    output: str = "runs"
    threads: int = 0  # 0: as many as PyTorch takes
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: Any = None  # the options of the method

    @property
    def folder(self) -> Path:
        return Path(self.output) / (self.name or f"{self.method}-seed{self.seed}")


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file (or the embedded default) and dotted overrides, later ones winning.

    Raises ConfigError for an unknown method or key, a value of the wrong type, or a file that is not YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    given: Any = OmegaConf.create()
    try:
        if path is not None:
            if not Path(path).is_file():
                raise ConfigError(f"{path}: no such file (a setting is written key=value)")
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise ConfigError(f"{path}: expected `key: value` lines")
            given = OmegaConf.merge(given, loaded)
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals or not key:
                raise ConfigError(f"{override}: expected key=value, such as optimizer.lr=0.1")
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
        schema = schema_of(str(given.get("method", TrainConfig.method)))
        check_keys(OmegaConf.to_container(given), schema)
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        where = getattr(error, "full_key", None)
        raise ConfigError(f"{where or path}: {str(error).splitlines()[0]}") from None
    check_values(config)
    return config


@functools.cache
def schema_of(method: str) -> type[TrainConfig]:
    """TrainConfig with `loss` typed by the method's options."""
    if method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {method!r}{nearest(method, METHODS)}")
    options = METHODS[method].Options
    return make_dataclass("TrainConfig", [("loss", options, field(default_factory=options))], bases=(TrainConfig,))


def nearest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def keys_of(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass, with its type."""
    keys: dict[str, Any] = {}
    for one in fields(schema):
        kind = type(one.default_factory()) if callable(one.default_factory) else None
        if kind is not None and is_dataclass(kind):
            keys[prefix + one.name] = kind
            keys |= keys_of(kind, f"{prefix}{one.name}.")
        else:
            keys[prefix + one.name] = one.type
    return keys


def check_keys(given: Any, schema: type, prefix: str = "") -> None:
    known = keys_of(schema)
    for key, value in (given or {}).items():
        full = f"{prefix}{key}"
        if full not in known:
            leaves = {name.rsplit(".", 1)[-1]: name for name in known}
            guess = nearest(full, known) or next(
                (f" (did you mean {leaves[name]}?)" for name in difflib.get_close_matches(str(key), leaves, n=1)), ""
            )
            raise ConfigError(f"{full}: no such key{guess}")
        if isinstance(value, dict):
            if not is_dataclass(known[full]):
                raise ConfigError(f"{full}: expected one value, got a group")
            check_keys(value, schema, f"{full}.")
        elif is_dataclass(known[full]):
            inner = ", ".join(one.name for one in fields(known[full])) or "none for this method"
            raise ConfigError(f"{full}: a group, set one of its keys ({inner}), as in {full}.KEY=VALUE")


def check_values(config: TrainConfig) -> None:
    positive = {
        "model.width": config.model.width,
        "optimizer.lr": config.optimizer.lr,
        "pretrain.lr": config.pretrain.lr,
        "optimizer.batch_size": config.optimizer.batch_size,
        "optimizer.outlier_batch_size": config.optimizer.outlier_batch_size,
    }
    for key, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{key}: expected a positive number, got {value}")
    ranges = {
        "epochs": (config.epochs, math.inf),
        "pretrain.epochs": (config.pretrain.epochs, math.inf),
        "seed": (config.seed, 2**32),
        "threads": (config.threads, 1024),
        "optimizer.momentum": (config.optimizer.momentum, 1),
        "optimizer.weight_decay": (config.optimizer.weight_decay, math.inf),
    }
    for key, (value, end) in ranges.items():
        if not 0 <= value < end:
            limit = "" if end == math.inf else f" and less than {end}"
            raise ConfigError(f"{key}: expected 0 or more{limit}, got {value}")
    if any(parent.exists() and not parent.is_dir() for parent in (config.folder, *config.folder.parents)):
        raise ConfigError(f"output, name: expected a folder, and {config.folder} is or lies under a file")
    if config.data.name != "digits":
        raise ConfigError(f"data.name: expected digits, got {config.data.name!r}")
    try:
        METHODS[config.method](config.loss)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def to_yaml(config: TrainConfig) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
