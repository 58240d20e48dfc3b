"""What losses take as logits and targets, and what they say of anything else."""

import pytest
import torch
from test_losses import K, N, single_label

from oodkern.losses import EnergyLoss, OutlierExposureLoss


def test_rejects():
    zi, y, zo = single_label()
    loss = OutlierExposureLoss()
    with pytest.raises(ValueError, match="margin_in < margin_out"):
        EnergyLoss(margin_in=-7, margin_out=-25)
    with pytest.raises(ValueError, match="margin_in < margin_out"):
        EnergyLoss(margin_in=float("nan"))
    with pytest.raises(ValueError, match="alpha: expected a finite number that is not negative, got -1"):
        OutlierExposureLoss(alpha=-1)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, batchmean, none, got 'avg'"):
        OutlierExposureLoss(reduction="avg")
    with pytest.raises(ValueError, match="temperature: JointEnergy has none"):
        EnergyLoss(temperature=2.0, multi_label=True)
    with pytest.raises(ValueError, match=r"target: expected classes in 0\.\.6, got 7"):
        loss(zi, y.clone().fill_(7), zo)
    with pytest.raises(ValueError, match=r"target: expected classes in 0\.\.6, got -1"):
        loss(zi, y.clone().fill_(-1), zo)
    with pytest.raises(
        ValueError, match=r"target: expected \[9\], got \[9, 7\] \(multi-label targets need multi_label=True\)"
    ):
        loss(zi, torch.zeros(N, K), zo)
    with pytest.raises(TypeError, match="target: expected integers, got"):
        loss(zi, y.float(), zo)
    with pytest.raises(ValueError, match="logits_ood: expected 7 classes"):
        loss(zi, y, zo[:, :3])
    with pytest.raises(ValueError, match=r"logits: expected \[N, K\], got \[7\]"):
        loss(zi[0], y[0], zo)
    with pytest.raises(ValueError, match="is_ood: goes with the mixed style"):
        loss(zi, y, is_ood=y < 0)
    labels = torch.zeros(N, K)
    many = OutlierExposureLoss(multi_label=True)
    many(zi, labels), many(zi, torch.cat([labels[1:], -torch.ones(1, K)]))
    for bad, arguments in ((7.0, (zo,)), (-1.0, (zo,)), (7.0, ()), (0.5, ())):
        wrong = labels.clone()
        wrong[2, 3] = bad
        with pytest.raises(ValueError, match="target: expected 0 or 1"):
            many(zi, wrong, *arguments)
    wrong[2, 3] = -1.0  # half a row
    with pytest.raises(ValueError, match="a whole row of -1 for an outlier"):
        many(zi, wrong)
    with pytest.raises(ValueError, match="logits_ood: expected on cpu, where logits are, got meta"):
        loss(zi, y, zo.to("meta"))
    with pytest.raises(TypeError, match=r"is_ood: expected a torch\.Tensor, got list"):
        many(zi, labels, is_ood=[True] * N)
    with pytest.raises(ValueError, match=r"is_ood: expected bool \[9\]"):
        OutlierExposureLoss(multi_label=True)(zi, torch.zeros(N, K), is_ood=torch.zeros(3, dtype=torch.bool))
