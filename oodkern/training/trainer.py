"""Pretrains a baseline, fine-tunes it with a method, and judges both."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import oodkern
from oodkern.config import TrainConfig, to_yaml
from oodkern.data import OODSplit, load_digits, stream, vary
from oodkern.losses import ClassificationLoss
from oodkern.methods import METHODS, Method, as_score
from oodkern.models import SmallCNN
from oodkern.training import files
from oodkern.training.evaluation import Evaluation, evaluate, logits_of

OUTPUTS = ("config.yaml", "environment.json", "metrics.jsonl", "last.ckpt", "scores.npz", "not_finite.pt")


class NotFinite(Exception):
    """The loss, or what the model makes of the data, became NaN or infinite. The batch of a loss has been saved."""


@dataclass(frozen=True)
class Run:
    """What a training run found."""

    folder: Path
    split: OODSplit
    baseline: list[Evaluation]  # by each score
    method: Evaluation
    decided: dict[str, Any]  # by the method, such as margins
    seconds: float


def train(config: TrainConfig, log: Callable[[str], None] = print, progress: bool = False) -> Run:
    """Runs a configuration and writes its folder: config.yaml, environment.json, metrics.jsonl, last.ckpt, scores.npz.

    `log` gets lines for a person; `progress` shows bars. Raises NotFinite when the loss is, with the batch saved.
    The same configuration gives the same numbers at the same number of threads.
    """
    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:  # a run that stops early must not leave its beginning beside another run's end
        (folder / name).unlink(missing_ok=True)
    files.write_text(folder / "config.yaml", to_yaml(config))
    files.write_json(folder / "environment.json", environment())

    split = load_digits(config.seed)
    log(split.describe())
    model = SmallCNN(split.train_images.shape[1], split.num_classes, config.model.width)
    method: Method = METHODS[config.method](config.loss)

    with files.JSONLines(folder / "metrics.jsonl") as lines:
        loop = Loop(config, split, folder, lines, progress)
        loop.run("pretrain", model, ClassificationLoss(), False, config.pretrain.epochs, config.pretrain.lr)
        baseline = [evaluate(model, split, name, partial(as_score, name)) for name in ("msp", "energy")]

        loss, decided = method.build_loss(logits_of(model, split.train_images), logits_of(model, split.outliers))
        if decided:
            lines.write(stage="decided", **decided)
            log(method.describe(decided))
        tuned = copy.deepcopy(model)
        loop.run(config.method, tuned, loss, method.uses_outliers, config.epochs, config.optimizer.lr)
        result = evaluate(tuned, split, method.score_name, method.score)
        for stage, one in (*(("baseline", each) for each in baseline), (config.method, result)):
            ood = {name: metrics.as_dict() for name, metrics in one.ood.items()}
            lines.write(stage=stage, score=one.score_name, accuracy=one.accuracy, ood=ood)

    files.save_checkpoint(folder / "last.ckpt", {"model": tuned.state_dict(), "baseline": model.state_dict()})
    files.save_scores(folder / "scores.npz", result.scores)
    return Run(folder, split, baseline, result, decided, time.perf_counter() - started)


class Loop:
    """The steps of one configuration."""

    def __init__(self, config: TrainConfig, split: OODSplit, folder: Path, lines: files.JSONLines, progress: bool):
        self.config, self.split, self.folder, self.lines, self.progress = config, split, folder, lines, progress

    def run(self, stage: str, model: nn.Module, loss: nn.Module, outliers: bool, epochs: int, lr: float) -> None:
        """Trains `model` for `epochs` passes over the ID images, in steps of one joint forward over [ID; outliers].

        One forward and not two: BatchNorm then normalises both by the statistics of the whole batch.
        """
        from tqdm import tqdm

        options, split = self.config.optimizer, self.split
        if epochs == 0:
            return
        steps_per_epoch = max(len(split.train_images) // options.batch_size, 1)
        steps = epochs * steps_per_epoch
        # A seed for each stage and use, so that no two random streams of a run or of the next seed walk in step.
        seed = self.config.seed * 8 + (0 if stage == "pretrain" else 4)
        id_stream = stream(len(split.train_images), options.batch_size, seed)
        outlier_stream = stream(len(split.outliers), options.outlier_batch_size, seed + 1)
        augmentation = torch.Generator().manual_seed(seed + 2)
        optimizer = torch.optim.SGD(
            [*model.parameters(), *loss.parameters()],
            lr=lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.momentum > 0,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for step in tqdm(range(1, steps + 1), desc=stage, unit="step", disable=not self.progress, leave=False):
            chosen = next(id_stream)
            images, target = split.train_images[chosen], split.train_labels[chosen]
            if outliers:
                unknown = split.outliers[next(outlier_stream)]
                if self.config.data.outlier_augmentation:
                    unknown = vary(unknown, augmentation)
                images = torch.cat([images, unknown])
                target = torch.cat([target, target.new_full((len(unknown),), -1)])
            value, parts = loss(model(images), target, return_parts=True)
            self.check_finite(value, stage, step, images, target)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            schedule.step()
            if step % steps_per_epoch == 0:
                parts = {name: float(part) for name, part in parts.items()}
                self.lines.write(stage=stage, epoch=step // steps_per_epoch, step=step, loss=value.item(), **parts)
        # The last step can diverge after its loss was looked at.
        if not all(logits_of(model, images).isfinite().all() for images in (split.train_images, split.outliers)):
            raise NotFinite(f"the model's logits are not finite after {stage}")

    def check_finite(self, value: Tensor, stage: str, step: int, images: Tensor, target: Tensor) -> None:
        if math.isfinite(value.item()):
            return
        path = self.folder / "not_finite.pt"
        files.save_checkpoint(path, {"images": images, "target": target, "stage": stage, "step": step})
        raise NotFinite(f"the loss is {value.item()} at step {step} of {stage}; the batch is in {path}")


def environment() -> dict[str, Any]:
    """Versions that the numbers of a run depend on."""
    return {
        "oodkern": oodkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
