"""The configuration of a run: the schema, a YAML file, and `key=value` from the command line.

`method` is read first, then the schema is built around that method's own options, so that an unknown or mistyped
key is an error at once, with the nearest key that exists. A file may have `base: FILE.yaml`, or a list of files, whose
keys count where it gives none; what is kept of a run has all keys, and no base.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

from oodkern._options import explanations
from oodkern.data.options import DataConfig
from oodkern.data.options import check as check_data
from oodkern.methods import METHODS, Method
from oodkern.models import check_model
from oodkern.schema import (
    BATCH_NORMS,
    COMPILED,
    HEADS,
    IMPLEMENTATIONS,
    OPTIMIZERS,
    PARALLEL,
    PRECISIONS,
    SCHEDULES,
    SUITED,
    SUITED_DATA,
    TrainConfig,
    check_outliers,
)
from oodkern.schema import OutlierPoolConfig as OutlierPoolConfig


class ConfigError(Exception):
    """What is wrong with a configuration, in one line for the person who wrote it."""


def read_given(path: str | None = None, overrides: Sequence[str] = ()) -> Any:
    """The keys that a YAML file, its `base` below it, and dotted overrides give, later ones winning, as written."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    given: Any = OmegaConf.create()
    try:
        if path is not None:
            given = OmegaConf.merge(given, read_file(path))
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals or not re.fullmatch(r"[\w.-]+", key):
                raise ConfigError(f"{override}: expected key=value, such as optimizer.lr=0.1")
        return OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
        raise one_line(error, path) from None


def read_file(path: str, above: tuple[Path, ...] = ()) -> Any:
    """The keys of a YAML file, over those of the files that its `base` names, each over the ones before it.

    Their names are relative to its own folder. Groups are merged key by key, lists replaced. `above` are the files that
    led here by their bases.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file (a setting is written key=value)")
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected `key: value` lines")
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, YAMLError) as error:
        raise one_line(error, path) from None
    bases = loaded.pop("base", [])
    names, above = [bases] if isinstance(bases, str) else bases, (*above, Path(path).resolve())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: base: expected a file or a list of files, got {bases}")
    found = []
    for name in names:
        below = Path(path).parent / Path(name).expanduser()
        if not below.is_file():
            raise ConfigError(f"{path}: base: no such file: {below}")
        if below.resolve() in above:
            raise ConfigError(f"{path}: base: expected a file that is not based on this one, got {name}")
        found.append(read_file(str(below), above))
    try:
        return OmegaConf.merge(*found, loaded)
    except TypeError:
        raise ConfigError(f"{path}: expected a group, a list or one value where its base has it") from None


def one_line(error: Exception, path: str | None) -> ConfigError:
    where = getattr(error, "full_key", None)
    return ConfigError(f"{where or path}: {str(error).splitlines()[0]}")


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file (or the embedded default) and dotted overrides, later ones winning.

    `method` and `data.name` are read first: they decide which keys there are and what suits them as a default.

    Raises ConfigError for an unknown method or key, a value of the wrong type, or a file that is not YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = read_given(path, overrides)
    try:
        method = str(given.get("method", TrainConfig.method))
        schema = schema_of(method)
        check_keys(OmegaConf.to_container(given), keys_of(schema))
        data = str(OmegaConf.select(given, "data.name", default=SUITED_DATA.get(method, DataConfig.name)))
        # A model that was trained before is not trained again unless asked.
        trained = ("pretrain.epochs=0",) if OmegaConf.select(given, "pretrain.checkpoint") else ()
        suited = OmegaConf.from_dotlist(
            [*SUITED.get(data, ()), *SUITED.get((data, method), ()), *trained, f"data.name={data}"]
        )
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), suited, given))
    except OmegaConfBaseException as error:
        raise one_line(error, path) from None
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


def is_free(kind: Any) -> bool:
    """Whether a key's type is a dict, whose own keys are the person's choice."""
    return str(kind).startswith("dict")


def check_keys(given: Any, known: dict[str, Any], prefix: str = "") -> None:
    for key, value in (given or {}).items():
        full = f"{prefix}{key}"
        if full not in known:
            leaves = {name.rsplit(".", 1)[-1]: name for name in known}
            guess = nearest(full, known) or next(
                (f" (did you mean {leaves[name]}?)" for name in difflib.get_close_matches(str(key), leaves, n=1)), ""
            )
            raise ConfigError(f"{full}: no such key{guess}")
        if isinstance(value, dict):
            if is_free(known[full]):
                known |= {f"{full}.{name}": str for name in value}
            elif not is_dataclass(known[full]):
                raise ConfigError(f"{full}: expected one value, got a group")
            check_keys(value, known, f"{full}.")
        elif is_dataclass(known[full]):
            inner = ", ".join(one.name for one in fields(known[full])) or "none for this method"
            raise ConfigError(f"{full}: a group, set one of its keys ({inner}), as in {full}.KEY=VALUE")


def check_values(config: TrainConfig) -> None:
    positive = {
        "optimizer.lr": config.optimizer.lr,
        "pretrain.lr": config.pretrain.lr,
        "optimizer.batch_size": config.optimizer.batch_size,
        "accumulate": config.accumulate,
        "optimizer.outlier_batch_size": config.optimizer.outlier_batch_size,
    }
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key}: expected a positive number, got {value}")
    ranges = {
        "epochs": (config.epochs, math.inf),
        "pretrain.epochs": (config.pretrain.epochs, math.inf),
        "seed": (config.seed, 2**32),
        "threads": (config.threads, 1024),
        "checkpoint_steps": (config.checkpoint_steps, math.inf),
        "optimizer.momentum": (config.optimizer.momentum, 1),
        "optimizer.weight_decay": (config.optimizer.weight_decay, math.inf),
        "optimizer.clip_norm": (config.optimizer.clip_norm, math.inf),
        "schedule.warmup": (config.schedule.warmup, math.inf),
        "schedule.gamma": (config.schedule.gamma, math.inf),
    }
    ranges |= {f"schedule.milestones[{i}]": (one, 1) for i, one in enumerate(config.schedule.milestones)}
    for key, (value, end) in ranges.items():
        if not 0 <= value < end:
            limit = "" if end == math.inf else f" and less than {end}"
            raise ConfigError(f"{key}: expected 0 or more{limit}, got {value}")
    choices = {
        "precision": (config.precision, PRECISIONS),
        "head": (config.head, HEADS),
        "batch_norm": (config.batch_norm, BATCH_NORMS),
        "compile": (config.compile, COMPILED),
        "parallel": (config.parallel, PARALLEL),
        "optimizer.name": (config.optimizer.name, OPTIMIZERS),
        "optimizer.implementation": (config.optimizer.implementation, IMPLEMENTATIONS),
        "schedule.name": (config.schedule.name, SCHEDULES),
    }
    for key, (name, known) in choices.items():
        if name not in known:
            raise ConfigError(f"{key}: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    check_device(config.device)
    if any(parent.exists() and not parent.is_dir() for parent in (config.folder, *config.folder.parents)):
        raise ConfigError(f"output, name: expected a folder, and {config.folder} is or lies under a file")
    try:
        check_data(config.data)
        check_model(config.model)
        method = METHODS[config.method](config.loss, config.multi_label)
        method.check_batches(config.optimizer.batch_size, config.optimizer.outlier_batch_size)
        check_scale(config, method)
        check_outliers(config.outliers, method)
    except ValueError as error:
        # A loss speaks of its arguments, which are the keys of a group here.
        named = hasattr(config.loss, re.split(r"[:,\[]", str(error))[0])
        raise ConfigError(f"loss.{error}" if named else str(error)) from None


def check_scale(config: TrainConfig, method: Method) -> None:
    """Raises ValueError for ways of making a step that do not go together."""
    sizes = [config.optimizer.batch_size] + [config.optimizer.outlier_batch_size] * method.uses_outliers
    if config.accumulate > min(sizes):
        raise ValueError(f"accumulate: expected at most {min(sizes)}, the images of a side, got {config.accumulate}")
    if config.compile != "none" and getattr(config.loss, "second_order", "") == "exact":
        raise ValueError(
            f"compile: what is compiled cannot be differentiated twice, as {config.method} does; take none, or with a "
            "smooth network loss.second_order=finite_difference"
        )
    if config.compile != "none" and config.checkpoint_activations:
        raise ValueError("checkpoint_activations: expected compile=none beside it, since neither sees into the other")
    sharded = [key for key in ("parallel_head",) if getattr(config, key)]
    sharded += ["parallel"] if config.parallel == "fully_shard" else []
    if len(sharded) > 1:
        raise ValueError("parallel_head: expected parallel=ddp beside it, got fully_shard")
    if sharded and config.precision == "fp16":
        raise ValueError(f"precision: expected bf16 or fp32 with {sharded[0]}, whose processes see other gradients")
    if config.parallel_head and config.head != "fused":
        raise ValueError(f"parallel_head: expected head=fused, whose losses form no logits, got head={config.head}")
    if config.parallel_head and not method.parallel_head:
        raise ValueError(f"parallel_head: {config.method} needs all classes in one place; expected false")


def check_device(name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")


def to_yaml(config: TrainConfig, explained: bool = False) -> str:
    """The configuration as YAML that reads back as itself; `explained` has what each key means behind it."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    if not explained:
        return text
    known, lines, group = explanations(config), [], ""
    for line in text.splitlines():
        key = line.strip().partition(":")[0]
        if not line.startswith(" "):
            group = ""
        meaning = known.get(group + key, "") if line.startswith("  ") == bool(group) else ""
        if not line.startswith((" ", "-")) and line.endswith(":"):
            group = f"{key}."
        lines.append(f"{line:<34} # {meaning}" if meaning else line)
    return "\n".join(lines) + "\n"
