"""What a training run made and found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from oodkern.classifier import Classifier
from oodkern.config import TrainConfig
from oodkern.data import OODSplit
from oodkern.training.evaluation import Evaluation, best_of


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
    score: Callable[[Tensor], Tensor]  # the method's, of logits [N, K]
    threshold: float  # inputs with a score above it are called OOD; accepts 95 % of the ID validation images
    decided: dict[str, Any]  # by the method, such as margins
    history: list[dict[str, Any]]  # the lines of metrics.jsonl
    seconds: float  # of training and evaluation, over all its sessions

    @property
    def best_baseline(self) -> Evaluation:
        """By the score with the higher mean AUROC over the OOD sets: chosen on the test, in the baseline's favour."""
        return best_of(self.baseline)
