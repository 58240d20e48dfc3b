"""The folder of a run: what is in it, and what happens to one that is there already."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import oodkern
from oodkern.config import ConfigError, TrainConfig, load_config, to_yaml
from oodkern.detector import read_checkpoint
from oodkern.training import files

OUTPUTS = (
    "last.ckpt",  # the first to go: a folder with one has all that resuming needs
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "best.ckpt",
    "scores.npz",
    "report.html",
    "calibration.svg",  # of `calibrate`
    "outlier-sets.svg",  # of `select-outliers`, which looks at the run's model
    "model.pt2",  # of `export`, as the next one
    "model.onnx",
)
# What may change between a run and its resumption: where it stands and who makes its batches.
FREE = ("name", "output", "device", "checkpoint_steps", "data.workers")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested dicts."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, one in value.items():
        found |= flat(one, f"{prefix}.{key}" if prefix else key)
    return found


def prepare(folder: Path, config: TrainConfig, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Makes the folder ready for a run; returns the checkpoint to go on from, or None for a run from the start.

    A folder with a checkpoint is resumed, or with `overwrite` emptied of a run's files; with neither it is left
    alone and ConfigError says so. Resuming asks for the configuration that the run has.
    """
    if resume and overwrite:
        raise ConfigError("--resume, --overwrite: expected one of them")
    if (folder / "last.ckpt").is_file() and not overwrite:
        state = read_checkpoint(folder / "last.ckpt")
        if not resume:
            raise ConfigError(
                f"{folder} holds a run (epoch {state['epoch']} of {state['stage']}): --resume goes on with it, "
                "--overwrite starts anew, name=... keeps both"
            )
        old, new = (flat(asdict(one)) for one in (load_config(str(folder / "config.yaml")), config))
        for key in sorted(old.keys() | new.keys()):
            if key not in FREE and old.get(key) != new.get(key):
                raise ConfigError(
                    f"{key}: the run in {folder} has {old.get(key)!r}, got {new.get(key)!r}; resume it as it was, or "
                    "give another name=... or output=..."
                )
        forget_batches(folder)
        note_environment(folder, finished=state["stage"] == config.method and state["epoch"] >= config.epochs)
    else:
        state = None
        keep(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:  # a run that stops early must not leave its beginning beside another run's end
            (folder / name).unlink(missing_ok=True)
        forget_batches(folder)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for made in folder.glob("pool/epoch-*"):  # features of outliers
            shutil.rmtree(made, ignore_errors=True)
        (folder / "metrics.jsonl").touch()  # which tells a run's config.yaml from a person's
        files.write_json(folder / "environment.json", environment())
    files.write_text(folder / "config.yaml", to_yaml(config))
    return state


def forget_batches(folder: Path) -> None:
    """Those that were kept since their loss was not finite, one of each process."""
    for path in folder.glob("not_finite*.pt"):
        path.unlink()


def keep(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError where a fresh run would take the place of files that are not of one that was cut short."""
    if (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder / 'config.yaml'} is not of a run, and would be overwritten; give another name=...")
    results = [name for name in ("best.ckpt", "scores.npz", "report.html") if (folder / name).exists()]
    if results and not overwrite:
        raise ConfigError(
            f"{folder} holds {', '.join(results)} of a run, and no last.ckpt to go on from: --overwrite starts anew, "
            "name=... keeps both"
        )


def note_environment(folder: Path, finished: bool) -> None:
    """Adds this session's versions where a run goes on under others than it had; a finished one keeps its own."""
    now = environment()
    noted = read_environment(folder) or dict(now)
    latest = (noted.get("resumed") or [noted])[-1]
    if not finished and any(latest.get(key) != value for key, value in now.items()):
        noted.setdefault("resumed", []).append(now)
        files.write_json(folder / "environment.json", noted)


def read_environment(folder: Path) -> dict[str, Any]:
    """What environment.json holds; nothing where it is gone or damaged, since no number depends on it."""
    try:
        found = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def environment() -> dict[str, Any]:
    """Versions that the numbers of a run depend on."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "oodkern": oodkern.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": cuda,
    }
