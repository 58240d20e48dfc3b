"""Separation's loss written out in float64, and batches for it."""

import torch
import torch.nn.functional as F
from test_losses import energy_formula, oe_formula

from oodkern.losses import EnergyLoss, SeparationLoss

N, M, D, K = 9, 14, 10, 6
ENERGY = {"alpha": 0.1, "margin_in": -9.0, "margin_out": -6.0}
EVERY = {
    "sum": {"alpha": 0.6, "beta": 0.8},
    "mean": {"alpha": 0.6, "beta": 3.0, "sep_reduction": "mean"},
    "energy": {"alpha": 0.6, "beta": 0.8, "outlier_loss": EnergyLoss(**ENERGY)},
    "projection": {"alpha": 0.6, "beta": 0.8, "separation": "projection"},
    "rank": {"alpha": 0.6, "beta": 0.8, "separation": "projection", "rank": 3},
    "first stage": {"alpha": 0.6, "beta": 0.0},
    "separation alone": {"alpha": 0.0, "beta": 0.8},
}


def build(name, **options):
    return SeparationLoss(**EVERY[name] | options)


def batch(dtype=torch.float64, rows=N, outliers=M, seed=5):
    """Features of all rows, ID first, the head's weight and bias, targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype)

    target = torch.randint(K, (rows,), generator=generator)
    return normal(rows + outliers, D), normal(K, D), normal(K), target


def logits_of(loss, features, weight, bias, target):
    """A batch as the split style takes it."""
    n, z = len(target), F.linear(features, weight, bias)
    return features[:n], weight, z[:n], target, features[n:], z[n:]


def mixed(x, z, y, xo, zo):
    """features, logits and targets of the same rows as one shuffled batch."""
    rows = len(x) + len(xo)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    return torch.cat([x, xo])[order], torch.cat([z, zo])[order], torch.cat([y, y.new_full((len(xo),), -1)])[order]


def directions(x, weight):
    """Cosines [N, K]; the weights have no gradient."""
    w = weight.detach()
    return (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def terms(loss, x, weight, z, y, xo, zo):
    """cluster of the ID rows, separation of the outliers (mean over classes, or share inside the span)."""
    cluster = -directions(x, weight)[torch.arange(len(y)), y]
    if loss.separation == "projection":
        Q = torch.linalg.svd(weight.detach(), full_matrices=False).Vh[: loss.rank].T
        return cluster, ((xo / xo.norm(dim=1, keepdim=True)) @ Q).square().sum(1)
    return cluster, directions(xo, weight).abs().mean(1)


def formula(loss, x, weight, z, y, xo, zo):
    """Of the reduction "mean", with the outlier loss's own formula at its defaults or those of ENERGY."""
    cluster, separation = terms(loss, x, weight, z, y, xo, zo)
    times = len(weight) if loss.separation == "cosine" and loss.sep_reduction != "mean" else 1
    outlier = energy_formula if isinstance(loss.outlier_loss, EnergyLoss) else oe_formula
    return outlier(z, y, zo) + loss.alpha * cluster.mean() + loss.beta * times * separation.mean()
