"""Policies that take samples from every cluster of the features: DOS and GReg+."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oodkern.ops._checks import check_count
from oodkern.ops.select import cluster_extremes
from oodkern.pools.minibatch import assign, check_clusters, minibatch_kmeans
from oodkern.pools.policy import (
    Head,
    ScoredPolicy,
    check_flag,
    check_score,
    check_scored,
    device_of,
)
from oodkern.pools.ranks import drawn, scored, taken

if TYPE_CHECKING:
    from oodkern.pools.store import FeatureStore

ROWS = 1 << 18  # samples of a chunk


@dataclass(frozen=True)
class GRegPlus(ScoredPolicy):
    """Of each cluster of the features the samples of lowest score, and of highest.

    Features are divided by their norms and clustered by `minibatch_kmeans`. With `two_way`, ceil(count / 2) samples are
    of lowest score and floor(count / 2) of highest; each side takes as many from every cluster, and the first clusters
    one more where that does not come out even. (With count < 2 clusters, then, each side is of the first clusters
    alone: k-means++ spreads those most.) Where clusters have too few members the rest is drawn from all samples that
    are not chosen and have a score.

    Order: those of lowest score, cluster after cluster, the lowest first; those of highest, likewise, the highest
    first; the rest in random order. Of equal scores the lower index comes first; a cluster that has too few for both
    sides gives them to the lowest.

    Args:
        clusters: k, at most N.
        two_way: take those of highest score, which are told apart already, beside those of lowest.
        score: energy, joint_energy, max_logit or msp, as `score_pool` has them, or with a minus before it. The lowest
            should be those most like in-distribution, as of energy, -joint_energy, -max_logit and -msp.
        absent_class: go by the softmax probability of the head's last class instead, which training on K + 1 classes
            gives outliers.
        clustering: [N] integers, the cluster of each sample: from `prepare`, which finds them once for many choices.

    Memory: the clustering, 2 bytes a sample up to 32,767 clusters (4 more while it is found); a byte a sample
    where samples are drawn; chunks, and what k-means takes.

    Source: Sharifi et al., ECCV 2024 (GReg+), which does so with 64 clusters of the candidates of every step.
    """

    name: ClassVar[str] = "gregplus"
    clusters: int = 64
    two_way: bool = True
    score: str = "energy"
    absent_class: bool = False
    clustering: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_count(self.clusters, "clusters", 1)
        check_flag(self.two_way, "two_way")
        check_score(self.score)
        check_flag(self.absent_class, "absent_class")

    def prepare(self, store: FeatureStore, head: Head | None, generator: torch.Generator) -> GRegPlus:
        """This with the clustering of the store, found where the head is (on the CPU without one)."""
        check_clusters(self.clusters, len(store))
        centers = minibatch_kmeans(store, self.clusters, generator, device=device_of(head))
        centers = self.processes.of_first(centers)
        index = assign(store, centers, processes=self.processes).index
        small = self.clusters <= torch.iinfo(torch.int16).max
        return replace(self, clustering=index.to(torch.int16 if small else torch.int32))

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        clustering = self.clustering
        if clustering is None:
            clustering = self.prepare(store, head, generator).clustering
            assert clustering is not None
        elif clustering.shape != (len(store),):
            raise ValueError(f"clustering: expected [{len(store)}], one a sample, got {list(clustering.shape)}")
        check_scored(count, scored(scores))
        ends = self._ends(scores, clustering, count)
        if len(ends) == count:
            return ends
        chosen = np.zeros(len(scores), bool)
        chosen[ends.numpy()] = True
        left = sum(len(one) for one in _free(scores, chosen))
        return torch.cat([ends, taken(_free(scores, chosen), drawn(left, count - len(ends), generator))])

    def _ends(self, scores: np.ndarray, clustering: Tensor, count: int) -> Tensor:
        """The ends of the clusters in order, no sample twice."""
        high = count // 2 if self.two_way else 0
        low = count - high
        per_side = -(-low // self.clusters)
        found = streamed_extremes(scores, clustering, self.clusters, per_side)
        place = torch.arange(per_side)
        ends = []
        for side, number in zip(found, (low, high), strict=True):
            # Of each cluster number // k, of the first number % k one more.
            quota = number // self.clusters + (torch.arange(self.clusters) < number % self.clusters)
            ends.append(side[(place < quota[:, None]) & (side >= 0)])
        lowest, highest = ends
        return torch.cat([lowest, highest[~torch.isin(highest, lowest)]])


def streamed_extremes(scores: np.ndarray, clustering: Tensor, clusters: int, per_side: int) -> tuple[Tensor, Tensor]:
    """`cluster_extremes`, in memory for a chunk and the result: the ends of a chunk and of what was found before are
    those of all rows so far. Candidates are in ascending order, so that of equal scores the lower index stays first.
    """
    rows, ends = max(ROWS, 4 * clusters * per_side), torch.empty(0, dtype=torch.int64)
    lowest = highest = ends
    for start in range(0, len(scores), rows):
        chunk = torch.arange(start, min(start + rows, len(scores)))
        candidates = torch.cat([ends[ends >= 0].unique(), chunk])
        score, cluster = torch.from_numpy(scores[candidates.numpy()]), clustering[candidates].long()
        found = cluster_extremes(score, cluster, clusters, per_side)
        lowest, highest = (torch.where(side < 0, side, candidates[side]) for side in found)
        ends = torch.cat([lowest, highest]).flatten()
    return lowest, highest


@dataclass(frozen=True)
class DOS(GRegPlus):
    """Of each cluster of the features the samples of lowest score, the hardest: GReg+ with one side.

    Arguments and order are those of `GRegPlus`.

    Source: Jiang et al., DOS: Diverse Outlier Sampling for Out-of-Distribution Detection, ICLR 2024, whose score is the
    absent class.
    """

    name: ClassVar[str] = "dos"
    two_way: bool = False


def _free(scores: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The samples that have a score and are not chosen, in ascending order and in pieces."""
    for start in range(0, len(scores), ROWS):
        own = slice(start, start + ROWS)
        yield np.flatnonzero(~(chosen[own] | np.isnan(scores[own]))) + start
