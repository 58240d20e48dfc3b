"""What a run keeps on the disk while it goes on, and goes on from."""

from __future__ import annotations

import copy
import time
from typing import Any

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import OODSplit
from oodkern.detector import FORMAT
from oodkern.methods import METHODS, Method
from oodkern.processes import Processes
from oodkern.training import files
from oodkern.training.random_state import own_seed, random_state, seed_everything, set_random_state
from oodkern.training.stage import NotFinite, Stage


class State:
    """A run's checkpoints: of several processes the first one writes them, and what they hold is of all."""

    def __init__(self, config: TrainConfig, split: OODSplit, lines: files.JSONLines, processes: Processes) -> None:
        self.config, self.split, self.lines, self.processes = config, split, lines, processes
        self.method: Method = METHODS[config.method](config.loss, split.multi_label)
        self.started, self.seconds_before = time.perf_counter(), 0.0
        self.decided: dict[str, Any] = {}
        self.watched: dict[str, float] = {}  # by the method, of the last validation
        self.threshold = float("nan")
        self.best = -1.0  # the validation of best.ckpt
        self.baseline: Classifier | None = None

    def keep_batch(self, error: NotFinite, stage: Stage) -> NotFinite:
        """Saves the batch of the last step, and says where."""
        assert stage.batch is not None
        own, others = "" if self.processes.first else f"-{self.processes.rank}", ""
        path = self.config.folder / f"not_finite{own}.pt"
        if self.processes.count > 1:
            others = ", with those of the other processes beside it"
        path.parent.mkdir(parents=True, exist_ok=True)  # on another machine there may be none
        files.save_checkpoint(path, stage.batch)
        return NotFinite(f"{error}, at step {stage.batch['step']} of {stage.name}; the batch is in {path}{others}")

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def inference_state(self, stage: Stage) -> dict[str, Any]:
        """What it takes to judge new images."""
        return {
            "format": FORMAT,
            "stage": stage.name,
            "epoch": stage.epoch,
            "model": stage.model.state_dict(),
            "classes": list(self.split.classes),
            "shape": list(self.split.train.shape),
            "multi_label": self.split.multi_label,
            "score": self.method.score_name,
            # Of the weights as they were validated: within an epoch there is none.
            "threshold": self.threshold if stage.at_epoch_end else float("nan"),
        }

    def save_best(self, stage: Stage) -> None:
        if self.processes.first:
            files.save_checkpoint(self.config.folder / "best.ckpt", self.inference_state(stage))

    def save(self, stage: Stage) -> None:
        stage.replica.export()
        training, (random, *others) = stage.state_dict(), self.processes.objects(random_state())
        if not self.processes.first:
            return
        files.save_checkpoint(
            self.config.folder / "last.ckpt",
            {
                **self.inference_state(stage),
                "baseline": None if self.baseline is None else self.baseline.state_dict(),
                "training": training,
                "processes": self.processes.count,
                "random": random,
                "random_of_others": others,
                "images": self.split.facts()["images"],
                "decided": self.decided,
                "best": self.best,
                "log_bytes": self.lines.sync(),
                "seconds": self.seconds,
            },
        )

    def set_random_state(self, state: dict[str, Any]) -> None:
        """That of this process; a process that was not there before begins with one of its own."""
        states = [state["random"], *state.get("random_of_others", ())]
        if self.processes.rank < len(states):
            set_random_state(states[self.processes.rank])
        else:
            seed_everything(own_seed(self.config.seed, self.processes.rank))

    def restore(self, state: dict[str, Any], model: Classifier) -> None:
        for key, value in self.split.facts().items():
            if state[key] != value:
                raise ConfigError(f"data: the run in {self.config.folder} has {key} {state[key]}, got {value}")
        if state["baseline"] is not None:
            model.load_state_dict(state["baseline"])
            self.baseline = copy.deepcopy(model)
        model.load_state_dict(state["model"])
        self.decided, self.best = dict(state["decided"]), state["best"]
        self.threshold, self.seconds_before = state["threshold"], state["seconds"]
