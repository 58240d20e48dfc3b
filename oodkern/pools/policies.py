"""Policies that go by one score of each sample, and all policies by their names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from oodkern.ops.top_k import TopK
from oodkern.pools.cluster_policies import DOS, GRegPlus
from oodkern.pools.policy import (
    Policy,
    ScoredPolicy,
    check_flag,
    check_fraction,
    check_score,
    check_scored,
)
from oodkern.pools.ranks import drawn, quantile_rank, rank_members, rank_slice, scored, taken
from oodkern.pools.thompson import POEM

if TYPE_CHECKING:
    from oodkern.pools.store import FeatureStore

__all__ = [
    "DOS",
    "NTOM",
    "POEM",
    "POLICIES",
    "EnergyWindow",
    "GRegPlus",
    "LowestMargin",
    "Policy",
    "TopScore",
    "Uniform",
]

ROWS = 1 << 18  # scores of a chunk


@dataclass(frozen=True)
class Uniform(Policy):
    """Any rows, each as likely as any other; in random order. Looks at no feature and at no head.

    In memory for `count` alone, where that is less than an eighth of the pool (numbers are drawn one after the other,
    and those that were there before passed over); for N numbers otherwise.
    """

    name: ClassVar[str] = "uniform"

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        return drawn(len(store), count, generator)


@dataclass(frozen=True)
class EnergyWindow(ScoredPolicy):
    """Any rows of those whose score is between two quantiles; in random order.

    Args:
        low, high: quantiles, 0 <= low <= high <= 1: of M samples with a score those of ranks floor(low M) to
            ceil(high M) - 1 in ascending order, of equal scores the lower index first.
        score: energy, joint_energy, max_logit or msp, as `score_pool` has them, or with a minus before it.

    Of the energy the lowest are those most like in-distribution.
    """

    name: ClassVar[str] = "energy-window"
    low: float = 0.0
    high: float = 0.25
    score: str = "energy"

    def __post_init__(self) -> None:
        check_fraction(self.low, "low")
        check_fraction(self.high, "high")
        if self.low > self.high:
            raise ValueError(f"low: expected at most high, {self.high}, got {self.low}")
        check_score(self.score)

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        check_scored(count, most := scored(scores))
        start, stop = quantile_rank(self.low, most), quantile_rank(self.high, most, up=True)
        if count > stop - start:
            raise ValueError(f"count: expected at most {stop - start}, the samples from low to high, got {count}")
        return taken(rank_members(scores, start, stop), drawn(stop - start, count, generator))


@dataclass(frozen=True)
class NTOM(ScoredPolicy):
    """The samples of `count` ranks from a quantile on, ascending by score: hard ones, but not the hardest.

    Args:
        quantile: q, 0..1: of M samples with a score those of ranks floor(q M) to floor(q M) + count - 1, of equal
            scores the lower index first.
        score: energy, joint_energy, max_logit or msp, as `score_pool` has them, or with a minus before it. The lowest
            should be those most like in-distribution, as of energy, -joint_energy, -max_logit and -msp.
        absent_class: go by the softmax probability of the head's last class instead, which training on K + 1 classes
            gives outliers.

    Source: Chen et al., ATOM: Robustifying Out-of-distribution Detection Using Outlier Mining, ECML 2021, whose score
    is the absent class.
    """

    name: ClassVar[str] = "ntom"
    quantile: float = 0.125
    score: str = "energy"
    absent_class: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.quantile, "quantile")
        check_score(self.score)
        check_flag(self.absent_class, "absent_class")

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        check_scored(count, most := scored(scores))
        start = quantile_rank(self.quantile, most)
        if count > most - start:
            raise ValueError(f"count: expected at most {most - start}, the samples from the quantile on, got {count}")
        return rank_slice(scores, start, start + count)


@dataclass(frozen=True)
class LowestMargin(ScoredPolicy):
    """The samples of smallest |score - threshold|, where a detector is least sure; ascending by that.

    Of equal margins, which are formed in float64, the lower index comes first.

    Args:
        threshold: in units of the score.
        score: energy, joint_energy, max_logit or msp, as `score_pool` has them, or with a minus before it.
    """

    name: ClassVar[str] = "margin"
    threshold: float
    score: str = "energy"

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise TypeError(f"threshold: expected a number, got {type(self.threshold).__name__}")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold: expected a finite number, got {self.threshold}")
        check_score(self.score)

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        return _best(((start, (one.double() - self.threshold).abs()) for start, one in _chunks(scores)), count, False)


@dataclass(frozen=True)
class TopScore(ScoredPolicy):
    """The samples of lowest score, or of highest; the best first, of equal scores the lower index first.

    Args:
        score: energy, joint_energy, max_logit or msp, as `score_pool` has them, or with a minus before it.
        largest: take the highest.
    """

    name: ClassVar[str] = "top-k"
    score: str = "energy"
    largest: bool = False

    def __post_init__(self) -> None:
        check_score(self.score)
        check_flag(self.largest, "largest")

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        return _best(_chunks(scores), count, self.largest)


def _chunks(scores: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(scores), ROWS):
        yield start, torch.from_numpy(np.array(scores[start : start + ROWS]))


def _best(chunks: Iterator[tuple[int, Tensor]], count: int, largest: bool) -> Tensor:
    top = TopK(count, largest)
    for start, scores in chunks:
        top.update(scores, start)
    check_scored(count, top.seen - top.nans)
    return top.result().indices


POLICIES: dict[str, type[Policy]] = {
    kind.name: kind for kind in (Uniform, EnergyWindow, NTOM, LowestMargin, TopScore, POEM, DOS, GRegPlus)
}
