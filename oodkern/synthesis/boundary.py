"""Outliers around the features that lie at the edge of their class, on the unit sphere.

A distance is d^2 = 2 - 2 cos there, so that the k-th nearest of n members has the k-th largest cosine: one order
statistic of a row of a product, no sorted neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern._precision import unrounded
from oodkern.ops._checks import INTEGERS, check_count, check_non_negative, check_tensor
from oodkern.ops._product import check_beside, check_matrix

# At most so many numbers are drawn at a time (16 MiB), around as many members as that allows. Part of the result, since
# what a generator gives depends on how much it is asked for at once.
NUMBERS = 1 << 22
# Bytes that cosines are given at a time, eight each, since kthvalue makes an index of each. No part of the result.
TEMPORARY = 1 << 26


class BoundaryOutliers(NamedTuple):
    """latents [M, D] float32 of norm 1 and labels [M] int64, the class that each was drawn at."""

    latents: Tensor
    labels: Tensor


@torch.no_grad()
def boundary_outliers(
    features: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    neighbour: float = 0.6,
    boundary: float = 0.1,
    draws: int = 1500,
    keep: int = 2,
    sigma: float = 0.07,
    rounds: int = 1,
) -> BoundaryOutliers:
    """Points just outside of each class: b + sigma g on the unit sphere, b at the edge of the class, g normal.

    Of the n members of a class, at norm 1, the distance of a point is that to its k-th nearest member, k = neighbour n
    rounded. (A member is its own nearest, and counts; for members k is 2 at least.) The boundary n members (rounded,
    one at least) of largest distance are the edge; around each `draws` points normalize(b + sigma g) are made, and
    the `keep` of largest distance are kept. The defaults are the released numbers, which are of classes of 500: the
    300th member, an edge of 50, 2 of 1500, sigma 0.07. OAL scales each outlier by the norm of a class's token
    embedding before it goes into a text encoder (`diffusion_latents`).

    Args:
        features: [N, D], float64, float32, bfloat16 or float16, such as a teacher's. Finite; rows of zeros, which have
            no direction, are left out.
        labels: [N] integers; rows with negative ones, outliers, are left out. Other numbers need not be consecutive.
        generator: of the draws; on the device of the features, or on the CPU for the same draws on every device.
        neighbour, boundary: shares of the class, above 0 and up to 1.
        draws, keep: how many are made around a member at the edge, and how many of them kept.
        sigma: of the noise in each coordinate, on features of norm 1.
        rounds: how often draws are made around the same members.

    Returns:
        `BoundaryOutliers(latents, labels)`, [M, D] float32 of norm 1 and [M] int64 with M = rounds * keep * (members
        at edges), on the features' device: by class, ascending, then round, then member (the farthest first, of equal
        ones the first), then the draw (likewise). Draws are the same however many are judged at once; two that are
        equally far to float32 rounding may change places where cosines are formed in other blocks.

    A class of one or two members has draws around one of them, farthest from the nearest member. Memory: the result,
    the members of a class at norm 1, draws around some members at a time, 16 MiB of each temporary (one draw at
    least), and their products, 64 MiB (one row of n numbers at least). Raises TypeError or ValueError for an argument
    of the wrong kind or shape, for features that are not finite, and for a class, which it names, of zeros alone.

    Source: Tao et al., Non-parametric Outlier Synthesis, ICLR 2023; with these numbers in OAL (arXiv 2406.16525).
    """
    _check(features, labels, generator, neighbour, boundary, draws, keep, sigma, rounds)
    labels = _with_direction(features, labels.long())
    classes = labels[labels >= 0].unique().tolist()
    found, counts = [features.new_empty(0, features.shape[1], dtype=torch.float32)], []
    for label in classes:
        members = reference.unit(features[labels == label].float())
        k = _share(neighbour, len(members))
        others = max(k, min(2, len(members)))  # a member's first is itself, which tells nothing
        # Two that are each other's farthest are equally far. Not every product of float32 gives both the same bits;
        # one of float64 does, rounded.
        exact = members.double()
        order = farness(exact, exact, others).float().argsort(stable=True, descending=True)
        edge = order[: _share(boundary, len(members))].repeat(rounds)
        found += _around(members[edge], members, k, generator, draws, keep, sigma)
        counts.append(len(edge) * keep)
    repeats = torch.tensor(counts, dtype=torch.int64, device=features.device)
    of = torch.tensor(classes, dtype=torch.int64, device=features.device).repeat_interleave(repeats)
    return BoundaryOutliers(torch.cat(found), of)


def _share(share: float, members: int) -> int:
    return min(max(int(share * members + 0.5), 1), members)


@unrounded
def farness(points: Tensor, members: Tensor, k: int) -> Tensor:
    """Minus the product of each point [P, D] with its k-th nearest member [n, D], of norm 1: [P], larger = farther.

    Of a point of norm 1 it is minus the cosine.
    """
    n = len(members)
    rows = max(TEMPORARY // (8 * n), 1)
    # The k-th largest of n is the (n + 1 - k)-th smallest.
    parts = [_smallest(part @ members.T, n + 1 - k) for part in points.split(rows)]
    return -torch.cat(parts)


def _smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of each row, whose order is lost."""
    if values.is_cpu:  # NumPy's partition takes a seventh of kthvalue's time for 500 a row, a sixth for 107
        values.numpy().partition(k - 1, axis=-1)
        return values[:, k - 1].clone()
    return values.kthvalue(k, dim=-1).values


def _around(
    centers: Tensor, members: Tensor, k: int, generator: torch.Generator, draws: int, keep: int, sigma: float
) -> Iterator[Tensor]:
    """The `keep` farthest of so many draws around each center [c, D], a group of centers at a time: [c * keep, D].

    The draws of a group are asked for at once, center after center; where those of one center are too many, they are
    a group by themselves and come in parts, of which the best are kept.
    """
    D = centers.shape[1]
    most = min(max(NUMBERS // D, 1), draws)
    for group in centers.split(max(NUMBERS // (draws * D), 1)):
        best, far = centers.new_empty(len(group), 0, D), centers.new_empty(len(group), 0)
        for start in range(0, draws, most):
            size = (len(group), min(most, draws - start), D)
            made = torch.randn(size, generator=generator, device=generator.device, dtype=centers.dtype).to(
                centers.device
            )
            torch.add(group[:, None], made, alpha=sigma, out=made)
            product = farness(made.flatten(0, 1), members, k).view(size[:2])
            # The cosines: rows are divided by their norms when they are chosen.
            distance = torch.cat([far, product / torch.linalg.vector_norm(made, dim=2)], 1)
            order = distance.argsort(dim=1, stable=True, descending=True)[:, :keep]
            far = distance.gather(1, order)
            if start:
                made = torch.cat([best, made], 1)
            best = made.gather(1, order[:, :, None].expand(-1, -1, D))
        yield reference.unit(best.flatten(0, 1))


def _check(features: Any, labels: Any, generator: Any, *numbers: Any) -> None:
    check_matrix(features, "features")
    check_tensor(labels, "labels")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: expected integers, got {str(labels.dtype).removeprefix('torch.')}")
    if tuple(labels.shape) != (len(features),):
        raise ValueError(f"labels: expected [{len(features)}], one a row of features, got {list(labels.shape)}")
    check_beside(labels, "labels", features, "features", dtype=False)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type not in ("cpu", features.device.type):
        raise ValueError(f"generator: expected on {features.device} or on the CPU, got {generator.device}")
    check_draws(*numbers)


def _with_direction(features: Tensor, labels: Tensor) -> Tensor:
    """The labels, with -1 for rows of zeros. Raises ValueError for rows that are not finite, and empty classes."""
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    bad = ~norms.isfinite() & (labels >= 0)
    if bad.any():
        raise ValueError(
            f"features: expected rows whose norm is finite in float32, got {int(bad.sum())} that are not, the first "
            f"of them row {int(bad.nonzero()[0])}, of class {int(labels[bad][0])}"
        )
    kept = torch.where(norms > 0, labels, -1)
    known = labels[labels >= 0].unique()
    lost = known[~torch.isin(known, kept)].tolist()
    if lost:
        raise ValueError(
            f"features: expected a row other than 0 of each class, got zeros alone of class {', '.join(map(str, lost))}"
        )
    return kept


def check_draws(neighbour: Any, boundary: Any, draws: Any, keep: Any, sigma: Any, rounds: Any) -> None:
    """Of the numbers among the arguments of `boundary_outliers`."""
    for share, name in ((neighbour, "neighbour"), (boundary, "boundary")):
        if not 0 < check_non_negative(share, name) <= 1:
            raise ValueError(f"{name}: expected a share of the class, above 0 and up to 1, got {share}")
    for count, name in ((draws, "draws"), (keep, "keep"), (rounds, "rounds")):
        check_count(count, name, 1)
    if keep > draws:
        raise ValueError(f"keep: expected {draws} or fewer, as many as draws, got {keep}")
    check_non_negative(sigma, "sigma")
