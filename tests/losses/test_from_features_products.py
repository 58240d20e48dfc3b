"""What losses from features cost in products: rows go through the head once, and gradients are formed with scores."""

import pytest
import torch
from test_from_features import REDUCTIONS, D, batch, calls
from test_losses import K, M, N

import oodkern
from oodkern.losses import ClassificationLoss, EnergyLoss, OutlierExposureLoss, logits


@pytest.mark.parametrize(
    ("loss", "passes"),
    [
        (EnergyLoss(), [N + M]),
        (OutlierExposureLoss(), [N + M]),
        (EnergyLoss(temperature=2.0), [N + M, N]),
        (ClassificationLoss(), [N]),
        (EnergyLoss(multi_label=True), [N + M]),
        (ClassificationLoss(multi_label=True), [N]),
    ],
)
def test_rows_go_through_the_head_once(monkeypatch, loss, passes):
    seen = []

    def counted(function):
        def count(features, *rest, **options):
            seen.append(len(features))
            return function(features, *rest, **options)

        return count

    for name in ("linear_energy", "linear_joint_energy"):
        monkeypatch.setattr(logits, name, counted(getattr(oodkern, name)))
    tensors, target = batch(loss.multi_label)
    loss.from_features(*tensors, target, N)
    assert seen == passes


@pytest.mark.parametrize("style", ["split", "mixed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("loss", "passes"),
    [
        (EnergyLoss(0.3, -3.1, 2.3), (N + M,)),
        (EnergyLoss(0.3, -3.1, 2.3, temperature=2.0), (N + M, N)),
        (EnergyLoss(0.3, -9.1, -1.3, multi_label=True), (N + M,)),
        (OutlierExposureLoss(0.3), (N + M,)),
        (OutlierExposureLoss(0.3, multi_label=True), (N + M,)),
        (ClassificationLoss(), (N,)),
        (ClassificationLoss(multi_label=True), (N,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_formed_with_the_scores(loss, passes, reduction, style, dtype):
    """The loss knows its slopes, where a reduction says what each row counts: all three products are of the forward
    pass. Elsewhere one is; the logits, few as they are, stay for the other two."""
    tensors, target = batch(loss.multi_label, dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss.reduction = reduction
    before = torch.ops.oodkern.multiplications()
    try:
        value = calls(loss, target)[style][0](*leaves)
    finally:
        loss.reduction = "mean"
    size = (sum(passes) if style == "split" else len(passes) * (N + M)) * K * D
    assert torch.ops.oodkern.multiplications() - before == (1 if reduction == "none" else 3) * size
    torch.autograd.grad(0.3 * value.sum(), leaves)
    assert torch.ops.oodkern.multiplications() - before == 3 * size


@pytest.mark.parametrize("n_id", [0, N + M])
@pytest.mark.parametrize("kind", [EnergyLoss, OutlierExposureLoss])
def test_gradients_are_formed_with_the_scores_of_one_part(kind, n_id):
    tensors, _ = batch(False, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    before = torch.ops.oodkern.multiplications()
    torch.autograd.grad(kind().from_features(*leaves, torch.zeros(n_id, dtype=torch.long), n_id), leaves)
    assert torch.ops.oodkern.multiplications() - before == 3 * (N + M) * K * D


def test_batched_gradients():
    tensors, target = batch(False)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = EnergyLoss().from_features(*leaves, target, N)
    once = torch.autograd.grad(value, leaves, retain_graph=True)
    several = torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True)
    for one, both in zip(once, several, strict=True):
        assert torch.allclose(both, torch.stack([one, -2 * one]))
