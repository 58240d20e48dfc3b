"""A classifier and a score, judged on ID and OOD images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oodkern.classifier import Classifier, Output
from oodkern.data import ImageSet, OODSplit
from oodkern.methods import as_score
from oodkern.metrics import OODMetrics, accuracy, mean_average_precision, ood_metrics
from oodkern.processes import ALONE, Processes

# An outlier score [N] of what a model makes of images, and of its head's weight [K, D]; larger = more OOD.
Score = Callable[[Output, Tensor], Tensor]
# Logits of so many images decide margins: their quantiles are then known to a percent.
SAMPLE = 10_000


@dataclass(frozen=True)
class Evaluation:
    score_name: str
    accuracy: float  # of multi-label classifiers the mean average precision
    ood: dict[str, OODMetrics]
    scores: dict[str, Tensor]  # "id" and each OOD set: outlier scores [N]
    # Which images those are of, [N]; a set that is not here has them of all. Unreadable ones have none.
    indices: dict[str, Tensor] = field(default_factory=dict)

    @property
    def mean_auroc(self) -> float:
        return float(np.mean([found.auroc for found in self.ood.values()]))


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the highest mean AUROC over the OOD sets."""
    return max(evaluations, key=lambda one: one.mean_auroc)


def plain_score(name: str, outputs: Output, weight: Tensor) -> Tensor:
    """One of logits alone, by its name."""
    return as_score(name, outputs.logits)


def evenly_spaced(count: int, limit: int) -> Tensor:
    """Indices of at most `limit` of `count` samples."""
    return torch.arange(min(limit, count)) * count // max(min(limit, count), 1)


class Judged(NamedTuple):
    """Of the images that can be read, on the CPU: logits [N, K] float32, outlier scores [N] by name, indices [N]."""

    logits: Tensor
    scores: dict[str, Tensor]
    indices: Tensor


@torch.no_grad()
def scored(
    model: Classifier,
    images: ImageSet,
    scores: Mapping[str, Score],
    batch_size: int = 512,
    limit: int = 0,
    processes: Processes = ALONE,
) -> Judged:
    """Logits and scores of images, in evaluation mode; the model's mode is restored.

    Features, which some scores are made of, are kept for one batch alone. With a `limit`, of as many images at most,
    evenly spaced. Each process looks at its share, and all get the numbers of all images, each once and in order.
    Images that cannot be read are left out: `indices` says whose the rows are.
    """
    device = next(model.parameters()).device
    indices = evenly_spaced(len(images), limit or len(images))
    own = indices[processes.share(len(indices))]
    # Of fewer images than processes one is looked at by all, since not every model and reader can do with none.
    indices = own if len(own) else indices[:1]
    was_training = model.training
    model.eval()
    logits: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in scores}
    kept: list[Tensor] = []
    try:
        for batch in indices.split(batch_size):
            seen, there = images.readable(batch)
            rows = len(there) if len(own) else 0
            pixels = (seen if len(there) else images.images(batch[:1])).to(device)
            outputs = model.outputs(pixels) if scores else Output(model(pixels), pixels)
            kept.append(there[:rows])
            logits.append(outputs.logits.float().cpu()[:rows])
            for name, score in scores.items():
                found[name].append(score(outputs, model.head.weight).cpu()[:rows])
    finally:
        model.train(was_training)

    def joined(batches: list[Tensor]) -> Tensor:
        return processes.gather(torch.cat(batches).to(device)).cpu()

    return Judged(joined(logits), {name: joined(batches) for name, batches in found.items()}, joined(kept))


def logits_of(model: Any, images: ImageSet, batch_size: int = 512, limit: int = 0) -> Tensor:
    """Logits [N, K] on the CPU, in evaluation mode; see `scored`."""
    return scored(model, images, {}, batch_size, limit).logits


def correct(logits: Tensor, labels: Tensor) -> float:
    """Accuracy against labels [N], or mean average precision against labels [N, K]."""
    return accuracy(logits.argmax(-1), labels) if labels.dim() == 1 else mean_average_precision(logits, labels)


def judge(
    model: Classifier, split: OODSplit, scores: Mapping[str, Score], processes: Processes = ALONE
) -> list[Evaluation]:
    """Accuracy on the ID test images, and the OOD metrics of each score against each OOD set."""
    sets = {"id": split.test, **split.test_ood}
    judged = {name: scored(model, images, scores, processes=processes) for name, images in sets.items()}
    accuracy = correct(judged["id"].logits, split.test.labels[judged["id"].indices])
    indices = {name: one.indices for name, one in judged.items()}
    evaluations = []
    for score in scores:
        by_set = {name: one.scores[score] for name, one in judged.items()}
        ood = {name: ood_metrics(by_set["id"], values) for name, values in by_set.items() if name != "id"}
        evaluations.append(Evaluation(score, accuracy, ood, by_set, indices))
    return evaluations


def evaluate(model: Classifier, split: OODSplit, score_name: str, score: Score) -> Evaluation:
    """Accuracy on the ID test images, and the OOD metrics of a score (see `Score`) against each OOD set."""
    return judge(model, split, {score_name: score})[0]
