"""A classifier and a score, judged on ID and OOD images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oodkern.data import OODSplit
from oodkern.metrics import OODMetrics, accuracy, ood_metrics


@dataclass(frozen=True)
class Evaluation:
    score_name: str
    accuracy: float
    ood: dict[str, OODMetrics]
    scores: dict[str, Tensor]  # "id" and each OOD set: outlier scores [N]


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Logits [N, K] in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(batch) for batch in images.split(batch_size)])
    finally:
        model.train(was_training)


def evaluate(model: nn.Module, split: OODSplit, score_name: str, score: Callable[[Tensor], Tensor]) -> Evaluation:
    """Accuracy on the ID test images, and the OOD metrics of a score (of logits) against each OOD set."""
    logits = logits_of(model, split.test_images)
    scores = {"id": score(logits)}
    for name, images in split.test_ood.items():
        scores[name] = score(logits_of(model, images))
    return Evaluation(
        score_name=score_name,
        accuracy=accuracy(logits.argmax(-1), split.test_labels),
        ood={name: ood_metrics(scores["id"], scores[name]) for name in split.test_ood},
        scores=scores,
    )
