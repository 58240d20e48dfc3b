"""A training step at many classes, losses of features and head against logits: `pytest benches/bench_step.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from measure import Row, interleaved_medians, peak_megabytes, relative_error
from torch import nn

from oodkern.losses import EnergyLoss, OutlierExposureLoss

ID, OUTLIERS, D, K = 256, 256, 512, 21_841
ALPHA, MARGIN_IN, MARGIN_OUT = 0.1, -13.5, -12.0  # about the energies of the random logits here, so that hinges act


def eager_energy(logits, target):
    energies = -torch.logsumexp(logits, -1)
    above, below = (energies[:ID] - MARGIN_IN).relu(), (MARGIN_OUT - energies[ID:]).relu()
    hinges = above.square().mean() + below.square().mean()
    return F.cross_entropy(logits[:ID], target) + ALPHA * hinges


def eager_outlier_exposure(logits, target):
    outliers = logits[ID:]
    flat = torch.logsumexp(outliers, -1) - outliers.mean(-1)
    return F.cross_entropy(logits[:ID], target) + ALPHA * flat.mean()


LOSSES = {
    "energy": (EnergyLoss(ALPHA, MARGIN_IN, MARGIN_OUT), eager_energy),
    "outlier exposure": (OutlierExposureLoss(ALPHA), eager_outlier_exposure),
}


class Model(nn.Module):
    """A backbone so small that the head is what takes time."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, D), nn.ReLU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.head = nn.Linear(D, K)
        nn.init.normal_(self.head.weight, std=2 * D**-0.5)  # logits of deviation 2


def fused(loss, model, images, target):
    return loss.from_features(model.backbone(images), model.head.weight, model.head.bias, target, ID)


def eager(loss, model, images, target):
    return loss(F.linear(model.backbone(images), model.head.weight, model.head.bias), target)


def step(function, loss, model, images, target):
    """Forward and backward: the gradients of all parameters, and nothing else."""
    return torch.autograd.grad(function(loss, model, images, target), list(model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_step(name, dtype, benchmark, record, rounds):
    torch.manual_seed(0)
    ours, theirs = LOSSES[name]
    model = Model().to(getattr(torch, dtype))
    images = torch.randn(ID + OUTLIERS, 64).to(getattr(torch, dtype))
    target = torch.randint(0, K, (ID,))
    contenders = {
        "oodkern": lambda: step(fused, ours, model, images, target),
        "eager": lambda: step(eager, theirs, model, images, target),
    }
    exact = step(eager, theirs, copy.deepcopy(model).double(), images.double(), target)
    # The worst of all gradients.
    errors = {label: max(map(relative_error, work(), exact)) for label, work in contenders.items()}
    del exact
    record(
        Row(
            room="step",
            case=f"{name} loss, forward + backward",
            shape=(ID + OUTLIERS, D, K),
            dtype=dtype,
            milliseconds=interleaved_medians(contenders, rounds),
            megabytes={label: peak_megabytes(work) for label, work in contenders.items()},
            error=errors,
        )
    )
    benchmark.pedantic(contenders["oodkern"], rounds=1)
    assert errors["oodkern"] <= 2 * errors["eager"] + 1e-5
