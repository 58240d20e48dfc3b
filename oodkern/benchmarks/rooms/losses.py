"""Room `losses`: features and head to the loss and all gradients, what a training step pays beside its backbone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of
from oodkern.benchmarks.rooms.linear_energy import add_product, chunk_rows, head_inputs
from oodkern.losses import ClassificationLoss, EnergyLoss, OutlierExposureLoss
from oodkern.losses.base import OutlierLoss

ALPHA = {"cross_entropy": 0.0, "energy": 0.1, "outlier_exposure": 0.5}


def margins(classes: int) -> tuple[float, float]:
    """About the energies of these logits, whose variance is 5, bias included: most rows are on the wrong side."""
    middle = -(math.log(classes) + 2.5)
    return middle - 0.25, middle + 0.25


OF_CLASSES: dict[str, Callable[[int], OutlierLoss]] = {
    "cross_entropy": lambda classes: ClassificationLoss(),
    "energy": lambda classes: EnergyLoss(ALPHA["energy"], *margins(classes)),
    "outlier_exposure": lambda classes: OutlierExposureLoss(ALPHA["outlier_exposure"]),
}


def step_inputs(
    N: int, M: int, D: int, K: int, bias: bool, dtype: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Features of N images and of M outliers, head, and the images' classes."""
    x, w, b = head_inputs(N + M, D, K, dtype, generator)
    return x, w, b if bias else None, torch.randint(0, K, (N,), generator=generator)


def ours(loss, x, w, b, target):
    return OF_CLASSES[loss](len(w)).from_features(x, w, b, target, n_id=len(target))


def published_energy(z, target):
    """As the released code has it: a logsumexp a side, and the cross-entropy's own."""
    n, (margin_in, margin_out) = len(target), margins(z.shape[1])
    inside, outside = -torch.logsumexp(z[:n], dim=1), -torch.logsumexp(z[n:], dim=1)
    hinges = torch.pow(F.relu(inside - margin_in), 2).mean() + torch.pow(F.relu(margin_out - outside), 2).mean()
    return F.cross_entropy(z[:n], target) + ALPHA["energy"] * hinges


def energy(z, target):
    """One logsumexp serves the cross-entropy as well."""
    n, (margin_in, margin_out) = len(target), margins(z.shape[1])
    lse = torch.logsumexp(z, -1)
    own = z[:n].gather(1, target[:, None]).squeeze(1)
    hinges = (-lse[:n] - margin_in).relu().square().mean() + (margin_out + lse[n:]).relu().square().mean()
    return (lse[:n] - own).mean() + ALPHA["energy"] * hinges


def outlier_exposure(z, target):
    """The released code's as well."""
    n = len(target)
    flat = torch.logsumexp(z[n:], -1) - z[n:].mean(-1)
    return F.cross_entropy(z[:n], target) + ALPHA["outlier_exposure"] * flat.mean()


OF_LOGITS = {"cross_entropy": F.cross_entropy, "energy": energy, "outlier_exposure": outlier_exposure}


def of_features(function, x, w, b, target):
    return function(F.linear(x, w, b).float(), target)


def exact(function, x, w, b, target):
    return function(F.linear(x, w, b), target)


def hinge_terms(loss, lse, outliers, classes):
    """What rows' losses have beside the cross-entropy, and its slope in their logsumexp."""
    margin_in, margin_out = margins(classes)
    if loss == "energy":
        distance = (margin_out + lse if outliers else -lse - margin_in).relu()
        return ALPHA[loss] * distance.square(), (2 if outliers else -2) * ALPHA[loss] * distance
    alpha = ALPHA[loss] if outliers else 0.0
    return alpha * lse, torch.full_like(lse, alpha)


def chunked_by_hand(loss, x, w, b, target, *, upstream):
    """Some rows of logits at a time, of images and then of outliers, their slopes while they are there."""
    n, m, classes = len(target), len(x) - len(target), len(w)
    dx, value = torch.empty_like(x), torch.zeros_like(upstream)
    dw, db = (torch.zeros_like(t, dtype=torch.float32) for t in (w, w[:, 0]))
    flat = -ALPHA[loss] / classes if loss == "outlier_exposure" else 0.0
    labels = target.split(chunk_rows(x, classes))
    for outliers, count, rows in ((False, n, slice(n)), (True, m, slice(n, None))):
        if not count:
            continue
        for i, (part, dpart) in enumerate(zip(*(t[rows].split(chunk_rows(x, classes)) for t in (x, dx)), strict=True)):
            z = F.linear(part, w, b).float()
            lse = z.logsumexp(-1)
            more, weight = hinge_terms(loss, lse, outliers, classes)
            value += more.sum() / count
            if outliers and flat:
                value += flat * z.sum() / count
            if not outliers:
                value += (lse - z.gather(1, labels[i][:, None]).squeeze(1)).sum() / count
                weight += 1
            scale = upstream / count
            slope = z.sub_(lse[:, None]).exp_().mul_(weight[:, None] * scale)
            if outliers and flat:
                slope += flat * scale
            if not outliers:
                slope.scatter_add_(1, labels[i][:, None], -scale.expand(len(z), 1))
            db += slope.sum(0)
            slope = slope.to(x.dtype)
            torch.mm(slope, w, out=dpart)
            add_product(dw, slope.T, part)
    return (dx, dw.to(w.dtype)) if b is None else (dx, dw.to(w.dtype), db.to(b.dtype))


def torch_linear_cross_entropy(x, w, b, target):
    """In chunks, which it forms gradients with; without options it is eager's code."""
    return F.linear_cross_entropy(x, w, target, linear_bias=b, options=torch.nn.LinearCrossEntropyOptions())


def liger(x, w, b, target):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(w, x, target, b)


def cut_cross_entropy(x, w, b, target):
    """Exact: nothing is filtered. Its own kernels take features of 16 bits on GPUs."""
    from cut_cross_entropy import linear_cross_entropy

    kernels = "cce" if x.is_cuda and x.dtype != torch.float32 else "torch_compile"
    return linear_cross_entropy(x, w, target, impl=kernels, filter_eps=None)


def pytorch_ood(loss, x, w, b, target):
    """Of logits. Its Outlier Exposure is a mean over images and outliers together, hence the constants."""
    from pytorch_ood.loss import EnergyRegularizedLoss, OutlierExposureLoss

    n, m = len(target), len(x) - len(target)
    z, labels = F.linear(x, w, b).float(), torch.cat([target, target.new_full((m,), -1)])
    if loss == "energy":
        return EnergyRegularizedLoss(ALPHA[loss], *margins(len(w)))(z, labels)
    return OutlierExposureLoss(ALPHA[loss] * n / m)(z, labels) * ((n + m) / n)


@case
def loss_step(*, loss: str, N: int, M: int, D: int, K: int, dtype: str, target: float | None = None) -> Case:
    """`loss`: cross_entropy (M = 0, and no bias: not all third parties take one), energy or outlier_exposure."""
    plain = loss == "cross_entropy"
    eager = functools.partial(of_features, OF_LOGITS[loss])
    contenders = {OURS: Contender(functools.partial(ours, loss))}
    if loss == "energy":
        contenders["published"] = Contender(functools.partial(of_features, published_energy))
    contenders |= {
        "eager": Contender(eager),
        COMPILED: Contender(eager, compiled=True),
        "chunked": Contender(functools.partial(chunked_by_hand, loss), by_hand=True),
    }
    if plain:
        contenders["F.linear_cross_entropy"] = Contender(
            torch_linear_cross_entropy, needs=("torch.nn.modules.linear_cross_entropy",)
        )
        contenders["Liger"] = Contender(liger, needs=("liger_kernel.transformers", "cuda"))
        contenders["cut_cross_entropy"] = Contender(cut_cross_entropy, needs=("cut_cross_entropy",))
    else:
        contenders["pytorch-ood"] = Contender(functools.partial(pytorch_ood, loss), needs=("pytorch_ood.loss",))
    return Case(
        room="losses",
        title=f"{loss}, backward",
        sizes={"N": N, "M": M, "D": D, "K": K},
        dtype=dtype,
        passes="backward",
        inputs=functools.partial(step_inputs, N, M, D, K, not plain, dtype),
        contenders=contenders,
        oracle=functools.partial(exact, OF_LOGITS[loss]),
        leaves=(0, 1) if plain else (0, 1, 2),
        upstreams="loss",
        flops=6.0 * (N + M) * D * K,
        bytes=2 * (bytes_of((N + M, D), dtype) + bytes_of((K, D), dtype)),
        slack=1e-5,
        target=target,
    )
