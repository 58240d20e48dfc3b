"""What Separation takes, and what it says of anything else, before any work."""

import pytest
from separation_formula import K, N, batch, build, logits_of

from oodkern.losses import OutlierExposureLoss, SeparationLoss


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ValueError, "alpha: expected a finite number that is not negative, got -1"),
        ({"beta": None}, TypeError, "beta: expected a number, got NoneType"),
        ({"sep_reduction": "max"}, ValueError, "sep_reduction: expected one of auto, sum, mean, got 'max'"),
        ({"separation": "svd"}, ValueError, "separation: expected one of cosine, projection, got 'svd'"),
        ({"outlier_loss": "oe"}, ValueError, "outlier_loss: expected a single-label OutlierExposureLoss or EnergyLoss"),
        ({"outlier_loss": OutlierExposureLoss(multi_label=True)}, ValueError, "outlier_loss: expected a single-label"),
        ({"rank": 3}, ValueError, "rank: expected with separation='projection' alone, got 3"),
        ({"rank": 0, "separation": "projection"}, ValueError, "rank: expected 1 or more, got 0"),
        ({"rank": 2.0, "separation": "projection"}, TypeError, "rank: expected an integer, got float"),
        ({"refresh": 0}, ValueError, "refresh: expected 1 or more, got 0"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, batchmean, none, got 'max'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        SeparationLoss(**options)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, r"features: expected \[N, D\], got \[10\]"),
        (0, lambda x: x[1:], ValueError, r"features: expected \[9, 10\], got \[8, 10\]"),
        (0, lambda x: x.long(), TypeError, "features: expected one of float64"),
        (0, lambda x: x.to("meta"), ValueError, "features: expected on cpu, where logits are, got meta"),
        (1, lambda w: w[1:], ValueError, r"weight: expected 6 rows, one for each class of the logits, got \[5, 10\]"),
        (1, lambda w: w[0], ValueError, r"weight: expected \[K, D\], got \[10\]"),
        (1, lambda w: w[:, 1:], ValueError, r"features: expected \[9, 9\], got \[9, 10\]"),
        (1, lambda w: w.to("meta"), ValueError, "weight: expected on cpu, where logits are, got meta"),
        (2, lambda z: z[0], ValueError, r"logits: expected \[N, K\], got \[6\]"),
        (3, lambda y: y + K, ValueError, r"target: expected classes in 0\.\.5"),
        (3, lambda y: y - K, ValueError, r"target: expected classes in 0\.\.5"),
        (3, lambda y: y.double(), TypeError, "target: expected integers"),
        (4, lambda x: None, ValueError, "features_ood, logits_ood: expected both of the outliers or neither"),
        (4, lambda x: x[1:], ValueError, r"features_ood: expected \[14, 10\], got \[13, 10\]"),
        (5, lambda z: None, ValueError, "features_ood, logits_ood: expected both of the outliers or neither"),
        (5, lambda z: z[:, 1:], ValueError, "logits_ood: expected 6 classes as logits have, got 5"),
    ],
)
def test_arguments_are_checked(place, change, error, message):
    loss = build("projection")
    arguments = list(logits_of(None, *batch()))
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        loss(*arguments)
    assert loss.basis is None, "work was done before the check"


def test_arguments_of_from_features_are_checked():
    x, w, b, y = batch()
    loss = build("projection")
    for arguments, error, message in [
        ((x, [w], b, y, N), TypeError, r"head_weight: expected a torch\.Tensor, got list"),
        ((x, w[0], b, y, N), ValueError, r"head_weight: expected \[K, D\]|head_weight: expected \[K, 10\]"),
        ((x, w[:, 1:], b, y, N), ValueError, r"head_weight: expected \[K, 10\] as features are"),
        ((x, w, b, y, N - 1), ValueError, r"target: expected \[8\], got \[9\]"),
        ((x, w, b, y + K, N), ValueError, r"target: expected classes in 0\.\.5"),
    ]:
        with pytest.raises(error, match=message):
            loss.from_features(*arguments)
        assert loss.basis is None, "work was done before the check"
        assert loss.calls == 0
