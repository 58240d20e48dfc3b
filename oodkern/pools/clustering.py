"""k-means: clusters of the features of a pool.

With D_ij = |x_i - x_j|^2 and a center c that is the mean of the samples in C,

    |x_i - c|^2 = mean_{j in C} D_ij - V_c,        V_c = 1/2 mean_{i in C} mean_{j in C} D_ij

so where D is small enough to keep, no iteration needs the features: it adds each row of D to the one cluster that it
belongs to, N^2 additions, where products with k centers and new centers take k N D multiplications each. With a the
weights of the old mean and b those of the new one, |c' - c|^2 = -1/2 (b - a)^T D (b - a), as they sum to the same.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from oodkern._precision import unrounded, widen
from oodkern.ops._checks import check_count, check_non_negative
from oodkern.ops._product import check_matrix
from oodkern.ops.select import nearest_center
from oodkern.pools import seeding

# Up to so many samples D is formed: 16 MiB in float32.
SMALL = 2048


class KMeans(NamedTuple):
    """centers [k, D], index [N] int64, and inertia, the sum of the squared distances to the nearest centers."""

    centers: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    inertia: Tensor


@torch.no_grad()
def kmeans(
    features: Tensor,
    clusters: int,
    generator: torch.Generator,
    restarts: int = 3,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> KMeans:
    """Clusters of the rows: Lloyd's algorithm from greedy k-means++ seeds, the best of some restarts.

    Args:
        features: [N, D], float64, float32, bfloat16 or float16, finite.
        clusters: k, from 1 to N.
        generator: the source of all random numbers, on any device.
        restarts: how many times to start anew; the run of lowest inertia is kept.
        iterations: how many times, at most, centers are moved in a run.
        tolerance: a run ends where sum_c |change of c|^2 is at most this times the mean variance of a feature, or
            where no sample changes its cluster.

    Returns:
        `KMeans(centers, index, inertia)`: [k, D], the means of the members of the last assignment; [N], the nearest of
        these centers as `oodkern.nearest_center` finds it; and sum_i |x_i - c_index(i)|^2, a scalar in squared units
        of the features. Centers and inertia are float32 (float64 for float64 features), also under autocast.

    A cluster that loses all its members goes on from the sample that is farthest from its center. Where there are
    fewer distinct samples than clusters some centers coincide, and clusters may be empty.

    The same state of the generator gives the same bits (on the CPU at the same number of threads). Up to 2,048 samples
    the N x N distances are held and restarts run together; beyond that they run one after another, in memory for the
    features once more and some numbers for each sample. A device is waited for once an iteration, to know whether to
    go on. Not differentiable. Raises TypeError or ValueError for an argument of the wrong kind or shape, or for
    features that are not finite.

    Source: Lloyd, 1982; Arthur and Vassilvitskii, 2007 (k-means++). Each seed is the best of 2 + log k candidates and
    the tolerance means what it does in scikit-learn's KMeans.
    """
    check_matrix(features, "features")
    check_count(clusters, "clusters", 1)
    if clusters > len(features):
        raise ValueError(f"clusters: expected at most {len(features)}, the number of samples, got {clusters}")
    check_generator(generator)
    check_count(restarts, "restarts", 1)
    check_count(iterations, "iterations", 1)
    return _kmeans(features, clusters, generator, restarts, iterations, check_non_negative(tolerance, "tolerance"))


def check_generator(value: Any) -> None:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(value).__name__}")


@unrounded
def _kmeans(
    features: Tensor, clusters: int, generator: torch.Generator, restarts: int, iterations: int, tolerance: float
) -> KMeans:
    x = widen(features)
    mean = x.mean(0)
    x = x - mean  # no distance changes, and |x|^2, of whose rounding they suffer, is smallest
    square = x.square().sum(1)
    total = float(square.sum())
    if not math.isfinite(total):
        raise ValueError("features: expected finite numbers, with squares that are finite too, got others")
    limit = tolerance * total / max(x.numel(), 1)
    candidates = 2 + int(math.log(clusters))
    # All at once: what is drawn does not depend on what is found.
    uniform = torch.rand(clusters, restarts, candidates, generator=generator, device=generator.device).to(x.device)
    if len(x) <= SMALL:
        seeds, label = _together(_distances(x, x), uniform, iterations, limit)
    else:
        seeds, label = _in_turn(x, square, uniform, iterations, limit)
    centers = Segments(label[None], clusters).means(x)[0]
    empty = centers.isnan()  # 0 / 0
    centers = torch.where(empty, x[seeds], centers)
    index, distance = nearest_center(x, centers)
    return KMeans(centers + mean, index, distance.sum())


def _distances(x: Tensor, y: Tensor, square: Tensor | None = None) -> Tensor:
    """|x_i - y_j|^2 as |x_i|^2 + |y_j|^2 - 2 x_i . y_j, less what this may be wrong by: equal samples are at 0."""
    products = x @ y.T
    shrink = 1 - 8 * torch.finfo(x.dtype).eps
    if square is None:
        own = square = products.diagonal() * shrink
    else:
        square, own = square * shrink, x.square().sum(1) * shrink
    return products.mul_(-2).add_(square).add_(own[:, None]).clamp_(min=0)


class Segments:
    """The members of each cluster in R assignments label [R, N]: places in order, where clusters begin, counts."""

    def __init__(self, label: Tensor, clusters: int) -> None:
        R, N = label.shape
        first = torch.arange(0, R * clusters, clusters, device=label.device)[:, None]
        ordered, order = (label + first).flatten().sort(stable=True)
        ends = torch.arange(R * clusters + 1, device=label.device)
        bounds = torch.searchsorted(ordered, ends)
        self.place, self.sample, self.start = order, order % N, bounds[:-1]
        self.count = bounds.diff().view(R, clusters)

    def means(self, rows: Tensor) -> Tensor:
        """[R, k, columns]: of the rows [N, columns] of each cluster's members; NaN where there are none."""
        sums = embedding_bag(self.sample, rows, self.start, mode="sum")
        return sums.view(*self.count.shape, -1).div_(self.count[:, :, None])

    def means_of(self, numbers: Tensor) -> Tensor:
        """[R, k]: of one number a sample and assignment, [R, N]."""
        sums = embedding_bag(self.place, numbers.reshape(-1, 1), self.start, mode="sum")
        return sums.view(self.count.shape) / self.count


def _together(distance: Tensor, uniform: Tensor, iterations: int, limit: float) -> tuple[Tensor, Tensor]:
    """The seeds [k] and the assignment [N] of the best of R restarts, from the squared distances [N, N]."""
    N, (k, R, _) = len(distance), uniform.shape
    seeds = seeding.among(distance, uniform)
    own, label = distance.index_select(0, seeds.flatten()).view(R, k, N).min(1)
    running = list(range(R))
    results: dict[int, tuple[Tensor, Tensor]] = {}  # restart -> inertia, assignment
    segments = Segments(label, k)
    lost = [bool(count) for count in (segments.count == 0).any(1).tolist()]
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(iterations):
        if any(lost):
            label = _refill(label, own, segments.count)
            segments = Segments(label, k)
        to_center = segments.means(distance)
        to_center -= segments.means_of(of_clusters(to_center, label))[:, :, None] / 2
        if any(lost):
            to_center.nan_to_num_(nan=torch.inf)  # the mean of a cluster that is without members all the same
        own, assigned = to_center.min(1)
        done = (assigned == label).all(1)
        after = (label, segments.count, to_center)
        segments = Segments(assigned, k)
        empty = (segments.count == 0).any(1)
        if before is not None and limit > 0:
            done |= (_moved(before, after) <= limit) & ~empty
        label, before = assigned, after
        ended, lost = torch.stack([done, empty]).tolist()
        if any(ended):
            for place, restart in enumerate(running):
                if ended[place]:
                    results[restart] = own[place].sum(), label[place]
            going = [place for place, over in enumerate(ended) if not over]
            running, lost = [running[place] for place in going], [lost[place] for place in going]
            if not going:
                break
            own, label, before = own[going], label[going], (after[0][going], after[1][going], after[2][going])
            segments = Segments(label, k)
    for place, restart in enumerate(running):
        results[restart] = own[place].sum(), label[place]
    best = int(torch.stack([results[restart][0] for restart in range(R)]).argmin())
    return seeds[best], results[best][1]


def of_clusters(numbers: Tensor, label: Tensor) -> Tensor:
    """Of [R, k, N] numbers those of each sample's cluster, [R, N]."""
    return numbers.gather(1, label[:, None])[:, 0]


def _moved(before: tuple[Tensor, Tensor, Tensor], after: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """sum_c |c' - c|^2 [R] of two assignments, each with its counts and the distances [R, k, N] to its centers.

    Those are D a less a number for each cluster, which b - a takes to 0.
    """
    new, old = (
        ((of_clusters(after[2], label) - of_clusters(before[2], label)) / count.gather(1, label)).sum(1)
        for label, count, _ in (after, before)
    )
    return (old - new) / 2


def _refill(label: Tensor, distance: Tensor, count: Tensor) -> Tensor:
    """Gives each cluster without members the sample farthest from its center, which leaves a cluster of several.

    label and distance [R, N], the cluster of each sample and the squared distance to its center, count [R, k].
    """
    empty = count == 0
    distance = torch.where(count.gather(1, label) > 1, distance, 0)
    farthest = distance.topk(min(int(empty.sum(1).max()), distance.shape[1]), dim=1)
    restart, cluster = empty.nonzero(as_tuple=True)
    rank = (empty.cumsum(1) - 1)[restart, cluster]
    apart = farthest.values[restart, rank] > 0  # a copy of its center would come back at once
    label = label.clone()
    label[restart[apart], farthest.indices[restart, rank][apart]] = cluster[apart]
    return label


def _in_turn(x: Tensor, square: Tensor, uniform: Tensor, iterations: int, limit: float) -> tuple[Tensor, Tensor]:
    """What `_together` does, from the features [N, D] and their squared norms, a restart after the other."""
    N, (k, R, _) = len(x), uniform.shape
    best: tuple[float, Tensor, Tensor] | None = None

    def rows(samples: Tensor) -> Tensor:
        return _distances(x[samples.flatten()], x, square).view(*samples.shape, N)

    for restart in range(R):
        seeds = seeding.greedy(rows, N, uniform[:, restart : restart + 1])[0]
        centers = x[seeds]
        label, own = nearest_center(x, centers)
        segments = Segments(label[None], k)
        lost = bool((segments.count == 0).any())
        for _ in range(iterations):
            if lost:
                label = _refill(label[None], own[None], segments.count)[0]
                segments = Segments(label[None], k)
            means = segments.means(x)[0]
            means = torch.where(means.isnan(), centers, means)
            moved = (means - centers).square().sum()
            centers = means
            assigned, own = nearest_center(x, centers)
            segments = Segments(assigned[None], k)
            empty = (segments.count == 0).any()
            done = (assigned == label).all() | ((moved <= limit) & ~empty)
            label = assigned
            ended, lost = torch.stack([done, empty]).tolist()
            if ended:
                break
        inertia = float(own.sum())
        if best is None or inertia < best[0]:
            best = inertia, seeds, label
    assert best is not None
    return best[1:]
