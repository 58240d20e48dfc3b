"""Metrics against scikit-learn, with and without ties."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oodkern import metrics

scores = st.lists(st.integers(-6, 6) | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60)


def labelled(ood, ids):
    return np.r_[np.ones(len(ood)), np.zeros(len(ids))], np.r_[ood, ids].astype(np.float64)


@settings(max_examples=200, deadline=None)
@given(scores, scores)
def test_against_scikit_learn(ids, ood):
    found = metrics.ood_metrics(np.array(ids), np.array(ood))
    y, s = labelled(ood, ids)
    assert found.auroc == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
    precision, recall, _ = sk.precision_recall_curve(y, s)
    assert found.aupr_out == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    precision, recall, _ = sk.precision_recall_curve(1 - y, -s)
    assert found.aupr_in == pytest.approx(sk.auc(recall, precision), abs=1e-12)
    assert metrics.aupr(ood, ids, average_precision=True) == pytest.approx(sk.average_precision_score(y, s), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    assert found.fpr95_ood_positive == pytest.approx(fpr[tpr >= 0.95 - 1e-9].min(), abs=1e-12)
    fpr, tpr, _ = sk.roc_curve(1 - y, -s, drop_intermediate=False)
    assert found.fpr95_id_positive == pytest.approx(fpr[tpr >= 0.95 - 1e-9].min(), abs=1e-12)


@settings(deadline=None)
@given(scores, st.floats(0.01, 1.0))
def test_threshold(ids, recall):
    ids = np.array(ids, dtype=np.float64)
    threshold = metrics.threshold_at_recall(ids, recall)
    assert (ids <= threshold).mean() >= recall - 1e-9
    below = ids[ids < threshold]
    assert len(below) == 0 or (ids <= below.max()).mean() < recall + 1e-9


def test_the_two_fprs_differ_and_are_what_they_say():
    ids, ood = np.arange(100.0), np.arange(50.0, 150.0)
    found = metrics.ood_metrics(ids, ood)
    # 95 OOD inputs lie at or over 55, and 45 ID inputs with them; 95 ID inputs lie at or under 94, and 45 OOD ones.
    assert (found.fpr95_ood_positive, found.fpr95_id_positive, found.threshold) == (0.45, 0.45, 94.0)
    # A tenth of the ID inputs score higher than all OOD ones: they must be accepted to accept 95 % of the ID.
    tailed = metrics.ood_metrics(np.r_[np.zeros(90), np.full(10, 200.0)], ood)
    assert (tailed.fpr95_ood_positive, tailed.fpr95_id_positive, tailed.threshold) == (0.1, 1.0, 200.0)


def test_perfect_and_worst():
    found = metrics.ood_metrics([0.0, 1.0], [2.0, 3.0])
    assert (found.auroc, found.aupr_out, found.aupr_in, found.fpr95_ood_positive) == (1.0, 1.0, 1.0, 0.0)
    assert metrics.ood_metrics([2.0, 3.0], [0.0, 1.0]).auroc == 0.0
    assert metrics.ood_metrics([1.0] * 5, [1.0] * 3).auroc == 0.5


def test_tensors_and_infinities():
    ids, ood = torch.randn(50), torch.randn(40) + 1
    expected = metrics.ood_metrics(ids.numpy(), ood.numpy())
    assert metrics.ood_metrics(ids.requires_grad_(), ood) == expected
    metrics.ood_metrics(ids.detach().bfloat16(), ood.bfloat16())
    ood[0] = torch.inf
    assert metrics.ood_metrics(ids, ood).auroc >= expected.auroc
    assert expected.as_dict()["n_id"] == 50


def test_large_counts_do_not_overflow():
    assert metrics.auroc(np.zeros(200_000), np.ones(200_000)) == 1.0


def test_rejects():
    with pytest.raises(ValueError, match="ood_scores: 2 of 3 scores are NaN"):
        metrics.ood_metrics([1.0], [np.nan, np.nan, 0.0])
    with pytest.raises(ValueError, match="id_scores: expected a non-empty"):
        metrics.ood_metrics([], [1.0])
    with pytest.raises(ValueError, match="id_scores: expected a non-empty"):
        metrics.ood_metrics(np.ones((2, 2)), [1.0])
    with pytest.raises(ValueError, match="recall"):
        metrics.ood_metrics([1.0], [1.0], recall=95)
    for recall in (0.0, 95, -0.1, float("nan")):
        with pytest.raises(ValueError, match="recall: expected a fraction"):
            metrics.threshold_at_recall([1.0, 2.0], recall)
        with pytest.raises(ValueError, match="recall: expected a fraction"):
            metrics.fpr_at_recall([1.0], [2.0], recall)


def test_accuracy_and_map():
    assert metrics.accuracy(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])) == pytest.approx(2 / 3)
    generator = np.random.default_rng(0)
    scores, target = generator.normal(size=(60, 5)).round(1), generator.integers(0, 2, (60, 5))
    expected = np.mean([sk.average_precision_score(target[:, c], scores[:, c]) for c in range(5)])
    assert metrics.mean_average_precision(scores, target) == pytest.approx(expected, abs=1e-12)
    target[:, 2] = 0  # a label that does not occur does not count
    expected = np.mean([sk.average_precision_score(target[:, c], scores[:, c]) for c in (0, 1, 3, 4)])
    assert metrics.mean_average_precision(scores, target) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="at least one label"):
        metrics.mean_average_precision(scores, np.zeros_like(target))
    target[0] = -1
    with pytest.raises(ValueError, match="leave the rows of outliers out"):
        metrics.mean_average_precision(scores, target)
    with pytest.raises(ValueError, match="two non-empty"):
        metrics.accuracy(np.ones(3), np.ones(2))
