"""What a training run made and found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from oodkern.classifier import Classifier
from oodkern.config import TrainConfig
from oodkern.data import OODSplit
from oodkern.methods import BASELINE_SCORES, MULTI_LABEL_BASELINE_SCORES, Method
from oodkern.processes import ALONE, Processes
from oodkern.training.evaluation import Evaluation, Score, best_of, judge, plain_score
from oodkern.training.files import JSONLines

OWN_SCORE = "the method's"


@dataclass(frozen=True)
class Run:
    """What a training run made and found."""

    folder: Path
    config: TrainConfig
    split: OODSplit
    model: Classifier
    baseline: list[Evaluation]  # of the model before fine-tuning, by each plain score
    before: Evaluation  # of that model by the method's score
    method: Evaluation
    plain: list[Evaluation]  # of the fine-tuned model, by each plain score
    score: Score  # the method's
    threshold: float  # inputs with a score above it are called OOD; accepts 95 % of the ID validation images
    decided: dict[str, Any]  # by the method, such as margins
    history: list[dict[str, Any]]  # the lines of metrics.jsonl
    seconds: float  # of training and evaluation, over all its sessions

    @property
    def best_baseline(self) -> Evaluation:
        """By the score with the higher mean AUROC over the OOD sets: chosen on the test, in the baseline's favour."""
        return best_of(self.baseline)


def judge_both(
    baseline: Classifier,
    model: Classifier,
    method: Method,
    split: OODSplit,
    lines: JSONLines,
    processes: Processes = ALONE,
) -> tuple[list[list[Evaluation]], list[Evaluation]]:
    """The model before and after fine-tuning: by each plain score, and by the method's. Logs what it finds."""
    names = MULTI_LABEL_BASELINE_SCORES if split.multi_label else BASELINE_SCORES
    scores: dict[str, Score] = {name: partial(plain_score, name) for name in names}
    plain, by_method = [], []
    for tested, title in ((baseline, "baseline"), (model, method.name)):
        # The method's own score may bear the name of a plain one, and be another (the energy at a temperature).
        *of_plain, own = judge(tested, split, {**scores, OWN_SCORE: method.score}, processes)
        plain.append(of_plain)
        by_method.append(replace(own, score_name=method.score_name))
        for one in [*of_plain, by_method[-1]]:
            ood = {name: metrics.as_dict() for name, metrics in one.ood.items()}
            lines.write(stage="result", model=title, score=one.score_name, accuracy=one.accuracy, ood=ood)
    return plain, by_method
