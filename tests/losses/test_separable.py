"""Losses whose two parts may be formed one after the other."""

import pytest
import torch
from test_losses import multi_label, single_label

from oodkern.losses import ClassificationLoss, EnergyLoss, OutlierExposureLoss


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("kind", [ClassificationLoss, OutlierExposureLoss, EnergyLoss])
def test_separable_says_whether_the_parts_may_be_formed_apart(kind, reduction, multi):
    margins = {"margin_in": -9.0, "margin_out": -6.0} if kind is EnergyLoss else {}
    loss = kind(reduction=reduction, multi_label=multi, **margins)
    zi, y, zo = multi_label() if multi else single_label()
    whole = loss(zi, y, zo).sum()
    apart = loss(zi, y, zo[:0]).sum() + loss(zi[:0], y[:0], zo).sum()
    assert loss.separable == (reduction in ("mean", "sum"))
    if loss.separable:
        torch.testing.assert_close(apart, whole)
