"""A pretrained model that several runs start from, so that a comparison trains it once.

A run that takes it has the bits that it would have had: the random state of that moment comes with the weights.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oodkern.config import TrainConfig
from oodkern.data import OODSplit
from oodkern.detector import FORMAT
from oodkern.training import files
from oodkern.training.folder import flat
from oodkern.training.random_state import random_state, set_random_state

# Keys that pretraining does not depend on, beside those of the loss and of the choice of outliers.
LATER = (
    *("method", "epochs", "name", "output", "checkpoint_steps", "split_forward", "data.workers"),
    *("optimizer.lr", "optimizer.outlier_batch_size"),
)


def key_of(config: TrainConfig, split: OODSplit) -> dict[str, Any]:
    """What pretraining depends on: runs with the same key make the same model, of images that are the same."""
    known = {**flat(asdict(config)), **split.facts(), "torch": str(torch.__version__)}
    return {
        key: value for key, value in known.items() if key not in LATER and not key.startswith(("loss", "outliers."))
    }


def read_pretrained(path: Path, config: TrainConfig, split: OODSplit, model: nn.Module) -> list[dict[str, Any]] | None:
    """Gives the model its weights and the process its random state; returns the lines of the pretraining's log.

    None where the file is not there, not readable, or of another configuration or number of images; model and random
    state then stay.
    """
    weights, random = copy.deepcopy(model.state_dict()), random_state()
    try:
        state = files.load_checkpoint(path)
        if state.get("format") != FORMAT or state["key"] != key_of(config, split):
            return None
        model.load_state_dict(state["model"])
        set_random_state(state["random"])
        return state["lines"]
    except Exception:  # whatever a damaged file raises: it is made again
        model.load_state_dict(weights)
        set_random_state(random)
        return None


def write_pretrained(
    path: Path, config: TrainConfig, split: OODSplit, model: nn.Module, lines: list[dict[str, Any]]
) -> None:
    # What the validation says of outliers depends on the method's score, which another run has another of.
    lines = [{name: value for name, value in line.items() if name != "validation_auroc"} for line in lines]
    state = {"format": FORMAT, "key": key_of(config, split), "model": model.state_dict(), "random": random_state()}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save_checkpoint(path, state | {"lines": lines})
