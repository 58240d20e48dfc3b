"""Pretrains a baseline, fine-tunes it with a method, and judges both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import ImageSet, OODSplit
from oodkern.data.augment import check_installed
from oodkern.data.damage import damage_lines
from oodkern.losses import ClassificationLoss
from oodkern.methods import Objective
from oodkern.metrics import auroc, threshold_at_recall
from oodkern.processes import ALONE, Processes
from oodkern.training import files
from oodkern.training.board import Board
from oodkern.training.evaluation import SAMPLE, Judged, Score, correct, scored
from oodkern.training.fused import check_fused_head
from oodkern.training.interrupt import Interrupt, stop
from oodkern.training.memory import memory_format
from oodkern.training.pool import OutlierPool
from oodkern.training.pretrained import read_pretrained, write_pretrained
from oodkern.training.progress import shown
from oodkern.training.random_state import own_seed, seed_everything
from oodkern.training.run import Run, judge_both
from oodkern.training.several import resumed_by_others, synchronised, what_differs
from oodkern.training.stage import NotFinite, Stage
from oodkern.training.start import build_classifier, setting_of
from oodkern.training.state import State


class Trainer(State):
    """The stages of a run and its log; what it keeps is of `State`."""

    def __init__(
        self,
        config: TrainConfig,
        split: OODSplit,
        device: torch.device,
        lines: files.JSONLines,
        log: Callable[[str], None],
        progress: bool,
        pretrained: Path | None = None,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(config, split, lines, processes)
        self.device, self.pretrained = device, pretrained
        self.log, self.progress = log, progress and processes.first
        self.board = Board(config.folder / "tensorboard") if processes.first else None
        self.pool: OutlierPool | None = None

    def run(self, state: dict[str, Any] | None) -> Run:
        config, split = self.config, self.split
        seed_everything(config.seed)
        self.log(split.describe())
        try:
            check_installed(augmentation=split.augmentation, outlier_augmentation=split.outlier_augmentation)
        except ImportError as error:
            raise ConfigError(str(error)) from None
        built: Any = build_classifier(config, split, weights=state is None, log=self.log)
        model: Classifier = built.to(self.device, memory_format=memory_format(config))
        for line in what_differs(config, self.method, self.processes, model):
            self.log(line)
        model = synchronised(model, config, self.processes, self.device)
        baseline_loss = ClassificationLoss(multi_label=split.multi_label)
        if config.head == "fused":
            few = split.train.images(torch.arange(min(16, len(split.train)))).to(self.device)
            check_fused_head(model, (baseline_loss, self.method.build_loss({})), few)
            self.log("fused head: losses are formed of features and head, and no logits are stored in training")
        if state is not None:
            self.log(f"resuming {config.folder} after epoch {state['epoch']} of {state['stage']}")
            if state.get("processes", 1) != self.processes.count:
                self.log(resumed_by_others(state.get("processes", 1), self.processes.count))
            self.restore(state, model)
        # What a finished run trained with, a teacher's outputs among it, is not made again to train nothing.
        finished = state is not None and state["stage"] == config.method and state["epoch"] >= config.epochs
        if config.outliers.pool and not finished:
            self.pool = OutlierPool(config, split, self.baseline or model, self.processes, self.log)
        if self.baseline is None:
            self.check(model)
            if not self.processes.first:  # dropout of its own; whatever is made of random numbers, is process 0's
                seed_everything(own_seed(config.seed, self.processes.rank))
            self.pretrain(model, Objective(baseline_loss.to(self.device)), state)
            state = None
            self.baseline = copy.deepcopy(model)
            try:
                starting = [self.scored(model, part, {}, SAMPLE).logits for part in (split.train, split.outliers)]
            except NotFinite as error:  # of a checkpoint, or of what no validation image showed
                raise NotFinite(f"{error} before {config.method} begins") from None
            self.decided = self.method.decide(*starting)
            if self.decided:
                self.lines.write(stage="decided", **self.decided)
        if self.decided:
            self.log(self.method.describe(self.decided))
        if not finished:
            try:
                objective = self.method.objective(self.decided, setting_of(config, split, self.baseline, self.device))
            except (ValueError, ImportError) as error:  # of what options name, such as a file of latents
                raise ConfigError(str(error)) from None
            objective.loss.to(self.device)
            self.train_stage("method", model, objective, self.method.uses_outliers, state)
        if self.board is not None:
            self.board.close()
        return self.judge(model)

    def check(self, model: Classifier) -> None:
        """What the method would not begin with is an error before pretraining. Leaves no trace in the random state."""
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                self.method.check(setting_of(self.config, self.split, copy.deepcopy(model), self.device))
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None

    def pretrain(self, model: Classifier, objective: Objective, state: dict[str, Any] | None) -> None:
        if self.pretrained is not None and state is None:
            lines = read_pretrained(self.pretrained, self.config, self.split, model)
            if lines is not None:
                for line in lines:
                    self.lines.write(**line)
                return
        self.train_stage("pretrain", model, objective, False, state)
        if self.pretrained is not None:
            lines = files.read_json_lines(self.config.folder / "metrics.jsonl")
            write_pretrained(self.pretrained, self.config, self.split, model, lines)

    def train_stage(
        self,
        kind: Literal["pretrain", "method"],
        model: Classifier,
        objective: Objective,
        outliers: bool,
        state: dict[str, Any] | None,
    ) -> None:
        from tqdm import tqdm

        pool = self.pool if kind == "method" else None
        stage = Stage(kind, self.config, self.split, model, objective, outliers, self.device, self.processes, pool)
        if state is not None:
            stage.load_state_dict(state["training"])
            self.set_random_state(state)
        elif kind == "method":
            self.validate(stage)
            self.save(stage)  # first: what holds best.ckpt alone is not resumed
            self.save_best(stage)
        if self.board is not None:
            self.board.begin(stage.steps_before + stage.step + 1)
        every = self.config.checkpoint_steps
        bar = tqdm(
            total=stage.steps,
            initial=stage.step,
            desc=stage.name,
            unit="step",
            disable=not self.progress,
            leave=False,
            dynamic_ncols=True,
        )
        with bar, contextlib.closing(stage), Interrupt() as interrupt:
            while stage.step < stage.steps:
                try:
                    parts = stage.advance()
                    bar.set_postfix(shown(parts, stage), refresh=False)
                    bar.update()
                    if stage.at_epoch_end:
                        self.end_epoch(stage)
                except NotFinite as error:
                    raise self.keep_batch(error, stage) from None
                asked = self.processes.most(interrupt.asked, self.device)  # all of them stop after the same step
                if stage.at_epoch_end or asked or (every and stage.step % every == 0):
                    self.save(stage)
                if asked:
                    stop(asked)
            # One that came while the last state was written.
            if asked := self.processes.most(interrupt.asked, self.device):
                stop(asked)

    def end_epoch(self, stage: Stage) -> None:
        found, means = self.validate(stage), stage.means()
        if stage.pool is not None:
            means |= stage.pool.means(stage)
        values = {"lr": stage.optimizer.param_groups[0]["lr"], **means, **found, **self.watched}
        self.lines.write(stage=stage.name, epoch=stage.epoch, step=stage.step, **values)
        if self.board is not None:
            self.board.write(stage.name, stage.steps_before + stage.step, values)
        if stage.kind == "method" and sum(found.values()) > self.best:
            self.best = sum(found.values())
            self.save_best(stage)
        # At the end alone: a function of that epoch's numbers, whether or not the run was resumed.
        if self.watched and stage.step == stage.steps and (line := self.method.warning(self.decided, self.watched)):
            self.log(f"warning: {line}; `oodkern calibrate {self.config.folder}` proposes others")
        try:
            stage.objective.check_epoch(means)
        except ValueError as error:
            raise ConfigError(f"{error} (epoch {stage.epoch} of {stage.name})") from None

    def validate(self, stage: Stage) -> dict[str, float]:
        """Accuracy on the ID validation images and AUROC against the outliers held out; sets the threshold.

        Never a look at the test: what is chosen by these numbers, best.ckpt and the threshold, is judged on others.
        """
        stage.replica.export()
        parts = self.split.validation, self.split.outlier_validation
        known, unknown = (self.scored(stage.model, images, {"": self.method.score}) for images in parts)
        self.tell_damage()
        self.threshold = threshold_at_recall(known.scores[""])
        if stage.kind == "method":
            self.watched = self.method.watch(self.decided, known.logits, unknown.logits)
        return {
            "validation_accuracy": correct(known.logits, self.split.validation.labels[known.indices]),
            "validation_auroc": auroc(known.scores[""], unknown.scores[""]),
        }

    def scored(self, model: Classifier, images: ImageSet, scores: Mapping[str, Score], limit: int = 0) -> Judged:
        found = scored(model, images, scores, limit=limit, processes=self.processes)
        if not found.logits.isfinite().all():  # the last step can diverge after its loss was looked at
            raise NotFinite("the model's logits are not finite")
        return found

    def tell_damage(self) -> None:
        """Names the images that could not be read, each once; every process has to."""
        split = self.split
        parts = (split.train, split.validation, split.test, split.outliers, split.outlier_validation)
        for line in damage_lines((*parts, *split.test_ood.values()), self.processes):
            self.log(line)

    def judge(self, model: Classifier) -> Run:
        """Both models on the test, once, at the end."""
        assert self.baseline is not None
        plain, by_method = judge_both(self.baseline, model, self.method, self.split, self.lines, self.processes)
        self.tell_damage()
        before, after = by_method
        old = {f"baseline/{name}": scores for name, scores in before.scores.items()}
        # Where images could not be read: which ones the rows are of.
        sets = {"id": self.split.test, **self.split.test_ood}
        rows = {f"indices/{name}": kept for name, kept in after.indices.items() if len(kept) < len(sets[name])}
        if self.processes.first:
            files.save_scores(self.config.folder / "scores.npz", {**after.scores, **old, **rows})
        return Run(
            folder=self.config.folder,
            config=self.config,
            split=self.split,
            model=model,
            baseline=plain[0],
            before=before,
            method=after,
            plain=plain[1],
            score=self.method.score,
            threshold=self.threshold,
            decided=self.decided,
            history=self.processes.once(lambda: files.read_json_lines(self.config.folder / "metrics.jsonl")),
            seconds=self.seconds,
        )
