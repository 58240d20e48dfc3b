"""Room `contrast`: CLUB, the bound on mutual information of OAL."""

from __future__ import annotations

import functools

import torch

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal

CHUNK_ROWS = {"cpu": 128, "cuda": 16_384}
PAIRS_ELEMENTS = 1 << 24  # what the published form holds several times


def published_club(mean, log_variance, target):
    """The [N, N, D] differences."""
    pairs = (target[None] - mean[:, None]).square().mean(1)
    return ((pairs - (target - mean).square()) / (2 * log_variance.exp())).sum(-1).mean()


def eager_club(mean, log_variance, target):
    """The closed form; centered, or float32 would lose it where the target is far from 0."""
    center = target.mean(0)
    c, m = target - center, mean - center
    return ((c.square().mean(0) + c * (2 * m - c)) * (-log_variance).exp()).sum() / (2 * len(target))


def chunked_club(mean, log_variance, target, *, upstream):
    """With e = g exp(-log_variance) / 2N, v the variance of a column, c and m as in the closed form: the loss times g
    is the sum of (v + c (2m - c)) e, and the target's gradient has the sums of e and of e m over rows in it."""
    N, D = target.shape
    share = upstream / (2 * N)
    center = target.mean(0, dtype=torch.float32)
    variance, slopes, moments = (torch.zeros(D, device=target.device) for _ in range(3))
    rows = CHUNK_ROWS[target.device.type]
    parts = [slice(start, start + rows) for start in range(0, N, rows)]
    for part in parts:
        e = log_variance[part].float().neg().exp_().mul_(share)
        variance += (target[part].float() - center).square_().sum(0)
        slopes += e.sum(0)
        moments += e.mul_(mean[part].float() - center).sum(0)
    variance /= N
    value = torch.zeros((), device=target.device)
    gradients = [torch.empty_like(one) for one in (mean, log_variance, target)]
    for part in parts:
        e = log_variance[part].float().neg().exp_().mul_(share)
        c, m = target[part].float() - center, mean[part].float() - center
        term = torch.addcmul(variance, c, 2 * m - c).mul_(e)
        value += term.sum()
        gradients[0][part] = 2 * c * e
        gradients[1][part] = term.neg_()
        gradients[2][part] = (c * slopes - moments).mul_(2 / N).add_(e.mul_(m.sub_(c)), alpha=2)
    return gradients


def gaussians(shape, dtype, generator):
    """Means, log-variances between -1 and 1, targets."""
    mean, log_variance, target = (random_normal(generator, shape, dtype) for _ in range(3))
    return mean, log_variance.tanh(), target


@case
def club(*, N: int, D: int, dtype: str, target: float | None = None) -> Case:
    contenders = {
        OURS: Contender(oodkern.club),
        "eager": Contender(eager_club),
        COMPILED: Contender(eager_club, compiled=True),
        "chunked": Contender(chunked_club, by_hand=True),
    }
    if N * N * D <= PAIRS_ELEMENTS:
        contenders["published"] = Contender(published_club)
    return Case(
        room="contrast",
        title="club, backward",
        sizes={"N": N, "D": D},
        dtype=dtype,
        passes="backward",
        inputs=functools.partial(gaussians, (N, D), dtype),
        contenders=contenders,
        oracle=reference.club,
        leaves=(0, 1, 2),
        bytes=6 * bytes_of((N, D), dtype),
        target=target,
    )
