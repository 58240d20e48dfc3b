"""How far an image is from the verdict's turning, to first order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from oodkern._precision import widen
from oodkern.ops._checks import check_count, score_dtype
from oodkern.ops._penalty import check_score
from oodkern.ops.norm import check_samples
from oodkern.ops.penalty import input_gradient_norm


class Radius(NamedTuple):
    """radius, gradient_norm and score, each [N]."""

    radius: Tensor
    gradient_norm: Tensor
    score: Tensor


def certified_radius(
    score_fn: Callable[[Tensor], Tensor], images: Tensor, threshold: float, batch: int = 256
) -> Radius:
    """The local certified radius of each image, (threshold - S(x)) / ||grad_x S(x)|| in the L2 norm.

    Args:
        score_fn: gives the scores [n] of images [n, ...], larger = more OOD, each of its own row alone: a model is to
            be in evaluation mode, since batch normalisation on batch statistics couples rows.
        images: [N, ...], float64, float32, bfloat16 or float16.
        threshold: an image is accepted where its score is at most this, and flagged where it is larger.
        batch: how many images go through score_fn at once; a graph of so many is held.

    Returns:
        `Radius(radius, gradient_norm, score)`, each [N] and without a graph, float32 (float64 where score_fn gives
        float64; the norm where the images are). The radius is in the unit of the images, normalised ones if those are
        given. Positive: x is accepted, and to first order stays so within that distance. Negative: it is flagged, and
        that far from being accepted. Infinite, of the same signs, where the gradient is 0. NaN stays in its row.

    Exact for a score that is linear in x. Where the gradient's norm at x bounds the Lipschitz constant of S on a ball
    of the radius, a lower bound of the distance to the threshold. For other networks a heuristic: a network of ReLUs
    is linear near x, but no further than its next kink. No gradient is left on parameters; whatever else score_fn
    changes stays changed. Raises TypeError or ValueError for an argument of the wrong kind or shape, or where no
    gradient leads from the scores to the images.

    Source: Sharifi et al., ECCV 2024, whose gradient penalty makes it larger.
    """
    check_samples(images, "images")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}")
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan")
    check_count(batch, "batch", 1)
    scores, norms = [images.new_empty(0, dtype=score_dtype(images))], [images.new_empty(0, dtype=score_dtype(images))]
    for some in images.split(batch) if len(images) else ():
        with torch.enable_grad():
            inputs = some.detach().requires_grad_()
            score = score_fn(inputs)
            check_score(score, len(some), "score_fn")
        norms.append(input_gradient_norm(score, inputs))
        scores.append(widen(score.detach()))
    score, norm = torch.cat(scores), torch.cat(norms)
    margin = threshold - score
    still = torch.where(margin >= 0, torch.inf, torch.where(margin < 0, -torch.inf, torch.nan))
    return Radius(torch.where(norm == 0, still, margin / norm), norm, score)
