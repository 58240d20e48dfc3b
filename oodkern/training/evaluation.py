"""A classifier and a score, judged on ID and OOD images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from oodkern.data import ImageSet, OODSplit
from oodkern.metrics import OODMetrics, accuracy, mean_average_precision, ood_metrics

# Logits of so many images decide margins: their quantiles are then known to a percent.
SAMPLE = 10_000


@dataclass(frozen=True)
class Evaluation:
    score_name: str
    accuracy: float  # of multi-label classifiers the mean average precision
    ood: dict[str, OODMetrics]
    scores: dict[str, Tensor]  # "id" and each OOD set: outlier scores [N]

    @property
    def mean_auroc(self) -> float:
        return float(np.mean([found.auroc for found in self.ood.values()]))


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the highest mean AUROC over the OOD sets."""
    return max(evaluations, key=lambda one: one.mean_auroc)


@torch.no_grad()
def logits_of(model: nn.Module, images: ImageSet, batch_size: int = 512, limit: int = 0) -> Tensor:
    """Logits [N, K] on the CPU, in evaluation mode; the model's mode is restored.

    With a `limit`, of as many images at most, evenly spaced.
    """
    device = next(model.parameters()).device
    indices = torch.arange(len(images))
    if 0 < limit < len(images):
        indices = torch.arange(limit) * len(images) // limit
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(images.images(batch).to(device)).float().cpu() for batch in indices.split(batch_size)])
    finally:
        model.train(was_training)


def logits_of_test(model: nn.Module, split: OODSplit) -> dict[str, Tensor]:
    """Logits of the ID test images, under "id", and of each OOD set."""
    return {name: logits_of(model, images) for name, images in {"id": split.test, **split.test_ood}.items()}


def predicted(logits: Tensor, multi_label: bool) -> Tensor:
    """The likeliest class [N] int64; of a multi-label classifier the labels likelier than not, [N, K] bool."""
    return logits > 0 if multi_label else logits.argmax(-1)


def name_of(label: int | list[bool], classes: Sequence[str]) -> str:
    """One row of `predicted(...).tolist()` in words: a class, or labels joined by +."""
    if isinstance(label, list):
        return "+".join(name for name, there in zip(classes, label, strict=True) if there) or "none"
    return classes[label]


def correct(logits: Tensor, labels: Tensor) -> float:
    """Accuracy against labels [N], or mean average precision against labels [N, K]."""
    return accuracy(logits.argmax(-1), labels) if labels.dim() == 1 else mean_average_precision(logits, labels)


def judge(
    logits: Mapping[str, Tensor], labels: Tensor, score_name: str, score: Callable[[Tensor], Tensor]
) -> Evaluation:
    """The OOD metrics of a score of logits, from what `logits_of_test` gives."""
    scores = {name: score(one) for name, one in logits.items()}
    return Evaluation(
        score_name=score_name,
        accuracy=correct(logits["id"], labels),
        ood={name: ood_metrics(scores["id"], one) for name, one in scores.items() if name != "id"},
        scores=scores,
    )


def evaluate(model: nn.Module, split: OODSplit, score_name: str, score: Callable[[Tensor], Tensor]) -> Evaluation:
    """Accuracy on the ID test images, and the OOD metrics of a score (of logits) against each OOD set."""
    return judge(logits_of_test(model, split), split.test.labels, score_name, score)
