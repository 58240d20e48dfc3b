"""Exact OOD metrics: float64 and integer counts, ties handled as groups.

Every score here is an outlier score: larger = more OOD. All results are fractions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class OODMetrics:
    """How well a score separates OOD from ID inputs.

    auroc: probability that an OOD input scores higher than an ID one (ties count half).
    aupr_out, aupr_in: area under precision and recall with OOD, or ID, as the positive class (trapezoids, from
        recall 0 at precision 1). They depend on the ratio n_ood / n_id.
    fpr95_ood_positive: share of ID inputs flagged where at least 95 % of OOD inputs are flagged (OpenOOD,
        pytorch-ood).
    fpr95_id_positive: share of OOD inputs accepted where at least 95 % of ID inputs are accepted (energy_ood, most
        papers). The two are different numbers: say which.
    threshold: inputs with a score above it are called OOD; the smallest that accepts 95 % of the ID inputs.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr95_ood_positive: float
    fpr95_id_positive: float
    threshold: float
    n_id: int
    n_ood: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def ood_metrics(id_scores: Any, ood_scores: Any, recall: float = 0.95) -> OODMetrics:
    """All metrics of a score. Takes tensors or arrays [N]; `recall` replaces the 95 % of the names.

    Raises ValueError where a set is empty, not one-dimensional, or holds NaN (with the count).
    """
    scores_id, scores_ood = scores_of(id_scores, "id_scores"), scores_of(ood_scores, "ood_scores")
    return OODMetrics(
        auroc=auroc(scores_id, scores_ood),
        aupr_out=aupr(positive=scores_ood, negative=scores_id),
        aupr_in=aupr(positive=-scores_id, negative=-scores_ood),
        fpr95_ood_positive=fpr_at_recall(positive=scores_ood, negative=scores_id, recall=recall),
        fpr95_id_positive=fpr_at_recall(positive=-scores_id, negative=-scores_ood, recall=recall),
        threshold=threshold_at_recall(scores_id, recall),
        n_id=len(scores_id),
        n_ood=len(scores_ood),
    )


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """P(ood > id) + P(ood = id) / 2, by exact counts."""
    scores_id, scores_ood = scores_of(id_scores, "id_scores"), scores_of(ood_scores, "ood_scores")
    ordered = np.sort(scores_id)
    below = np.searchsorted(ordered, scores_ood, "left").astype(np.int64)
    not_above = np.searchsorted(ordered, scores_ood, "right").astype(np.int64)
    return float((below.sum() + not_above.sum()) / (2 * len(scores_id) * len(scores_ood)))


def aupr(positive: Any, negative: Any, average_precision: bool = False) -> float:
    """Area under the precision-recall curve: trapezoids, or the sum of precision times the gain in recall."""
    true, false = cumulative_counts(scores_of(positive, "positive"), scores_of(negative, "negative"))
    precision = true / (true + false)
    gained = np.diff(true, prepend=0) / true[-1]
    if average_precision:
        return float((precision * gained).sum())
    before = np.concatenate([[1.0], precision[:-1]])
    return float(((precision + before) / 2 * gained).sum())


def fpr_at_recall(positive: Any, negative: Any, recall: float = 0.95) -> float:
    """The false positive rate at the highest threshold whose recall is at least `recall`."""
    true, false = cumulative_counts(scores_of(positive, "positive"), scores_of(negative, "negative"))
    reached = true >= needed(recall, int(true[-1]))
    return float(false[reached][0] / false[-1])


def threshold_at_recall(id_scores: Any, recall: float = 0.95) -> float:
    """The smallest t with at least `recall` of the ID scores <= t."""
    ordered = np.sort(scores_of(id_scores, "id_scores"))
    return float(ordered[needed(recall, len(ordered)) - 1])


def needed(recall: float, count: int) -> int:
    """How many of `count` make a recall, one at least. The tolerance is for products such as 0.07 * 100 > 7."""
    if not 0 < recall <= 1:
        raise ValueError(f"recall: expected a fraction in (0, 1], got {recall}")
    return max(int(np.ceil(recall * count - 1e-9)), 1)


def accuracy(prediction: Any, target: Any) -> float:
    """Share of equal entries of two integer arrays [N]."""
    prediction, target = to_numpy(prediction), to_numpy(target)
    if prediction.shape != target.shape or prediction.ndim != 1 or not len(target):
        raise ValueError(f"prediction, target: expected two non-empty [N], got {prediction.shape}, {target.shape}")
    return float((prediction == target).mean())


def mean_average_precision(scores: Any, target: Any) -> float:
    """mAP: average precision of each label, averaged over the labels that occur. Both [N, K], target in {0, 1}."""
    scores, target = to_numpy(scores).astype(np.float64), to_numpy(target)
    if scores.shape != target.shape or scores.ndim != 2:
        raise ValueError(f"scores, target: expected two [N, K], got {scores.shape} and {target.shape}")
    if not np.isin(target, (0, 1)).all():
        raise ValueError("target: expected 0 and 1 (leave the rows of outliers out)")
    target, values = target.astype(bool), []
    for column, labels in zip(scores.T, target.T, strict=True):
        if labels.all():
            values.append(1.0)
        elif labels.any():
            values.append(aupr(column[labels], column[~labels], average_precision=True))
    if not values:
        raise ValueError("target: expected at least one label that occurs, got none")
    return float(np.mean(values))


def cumulative_counts(positive: NDArray, negative: NDArray) -> tuple[NDArray, NDArray]:
    """Numbers of positives and negatives at or above each distinct score, from the highest score down."""
    scores = np.concatenate([positive, negative])
    order = np.argsort(-scores, kind="stable")
    is_positive = order < len(positive)
    ordered = scores[order]
    last_of_group = np.append(ordered[1:] != ordered[:-1], True)
    true = np.cumsum(is_positive, dtype=np.int64)[last_of_group]
    return true, np.flatnonzero(last_of_group) + 1 - true


def to_numpy(values: Any) -> NDArray:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() and values.element_size() < 4 else values.numpy()
    return np.asarray(values)


def scores_of(values: Any, name: str) -> NDArray[np.float64]:
    scores = to_numpy(values).astype(np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: expected a non-empty [N], got shape {scores.shape}")
    if missing := int(np.isnan(scores).sum()):
        raise ValueError(f"{name}: {missing} of {len(scores)} scores are NaN")
    return scores
