"""What every policy of selection is, and the scores that they go by."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from oodkern.ops._checks import check_count
from oodkern.pools.clustering import check_generator
from oodkern.pools.ranks import check_scores
from oodkern.pools.scoring import SCORES, Head, score_pool
from oodkern.pools.store import FeatureStore
from oodkern.pools.streaming import staged_chunks
from oodkern.processes import ALONE, Processes
from oodkern.reference import widen

ROWS = 65_536  # of a chunk


@dataclass(frozen=True)
class Policy:
    """A rule that chooses rows of a pool.

        policy = GRegPlus(clusters=64)
        policy = policy.prepare(store, head, generator)        # where a moving head is to choose again and again
        index = policy.select(store, head, 10_000, generator)

    What is chosen is a function of the store, the head, the count and the state of the generator alone. The policies of
    a job of several processes have those in `processes` (`dataclasses.replace(policy, processes=...)`), and every
    process calls with the same arguments and an equal generator.
    """

    name: ClassVar[str]
    processes: Processes = field(default=ALONE, kw_only=True, repr=False)

    def prepare(self, store: FeatureStore, head: Head | None, generator: torch.Generator) -> Policy:
        """The policy with what depends on the features alone, so that it need not be formed for every choice."""
        return self

    def scores(self, store: FeatureStore, head: Head | None, progress: bool = False) -> np.ndarray | None:
        """What it goes by, [N] float32 in a file that is mapped; None where that is not one number a sample."""
        return None

    @torch.no_grad()
    def select(
        self,
        store: FeatureStore,
        head: Head | None,
        count: int,
        generator: torch.Generator,
        scores: np.ndarray | None = None,
    ) -> Tensor:
        """Rows of the store.

        Args:
            store: the pool, N rows of D features.
            head: an nn.Linear, or (weight [K, D], bias [K] or None); None where the policy has no use for one.
            count: how many, 0..N.
            generator: the source of all random numbers, on any device.
            scores: what `scores(store, head)` gave, where the caller has it.

        Returns:
            [count] int64 on the CPU, no row twice, in the order that the policy says. Samples whose score is NaN are
            never among them.

        Raises TypeError or ValueError for an argument of the wrong kind, or where fewer than `count` samples have a
        score.
        """
        check_count(count, "count", 0)
        if count > len(store):
            raise ValueError(f"count: expected at most {len(store)}, the number of samples, got {count}")
        check_generator(generator)
        if scores is not None:
            check_scores(scores)
            if len(scores) != len(store):
                raise ValueError(f"scores: expected {len(store)}, one a sample, got {len(scores)}")
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        if scores is None:
            scores = self.scores(store, head)
        return self._choose(store, head, count, generator, scores)

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        raise NotImplementedError


class ScoredPolicy(Policy):
    """One that goes by its `score`, or by the absent class where it is told to."""

    score: str

    def scores(self, store: FeatureStore, head: Head | None, progress: bool = False) -> np.ndarray:
        if getattr(self, "absent_class", False):
            return absent_class_scores(store, head, self.processes, progress)
        return scores_of(store, head, self.score, self.processes, progress)


def check_scored(count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"count: expected at most {most}, the samples with a score, got {count}")


def check_score(name: Any) -> None:
    if not isinstance(name, str) or name.removeprefix("-") not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, or minus one of them (-msp), got {name!r}")


def check_fraction(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected 0..1, got {value}")


def check_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_head(head: Any) -> None:
    if head is None:
        raise ValueError("head: expected an nn.Linear, or (weight, bias), for the scores, got None")
    if not isinstance(head, nn.Linear | tuple | list):
        raise TypeError(f"head: expected an nn.Linear or a pair (weight, bias), got {type(head).__name__}")


def scores_of(
    store: FeatureStore, head: Any, score: str, processes: Processes = ALONE, progress: bool = False
) -> np.ndarray:
    """[N] float32 in a file that is mapped; those of a float64 pool are rounded. `score` may have a minus before it."""
    check_head(head)
    name = score.removeprefix("-")
    scores = score_pool(store, head, (name,), progress=progress, processes=processes)[name]
    if scores.dtype == np.float32 and name == score:
        return scores
    turned = _mapped(len(scores))
    for start in range(0, len(scores), ROWS):
        own = slice(start, start + ROWS)
        turned[own] = scores[own] if name == score else -scores[own]
    return turned


def absent_class_scores(store: FeatureStore, head: Any, processes: Processes, progress: bool = False) -> np.ndarray:
    """log p of the last class of the head, z_K + E, [N] float32 in a file that is mapped.

    The logarithm has the order of the probability, and none of its ties where it is 0 to rounding.
    """
    energy = scores_of(store, head, "energy", processes, progress)
    weight, bias = parameters_of(head)
    row, offset = widen(weight[-1]), 0.0 if bias is None else float(bias[-1])
    row = row.double() if store.dtype == torch.float64 else row.float()
    logarithm = _mapped(len(energy))
    for start, chunk in staged_chunks(store, ROWS, row.device):
        logit = chunk.to(row.dtype) @ row + offset
        own = slice(start, start + len(chunk))
        logarithm[own] = logit.float().cpu().numpy() + energy[own]
    return logarithm


def _mapped(N: int) -> np.ndarray:
    """Room for float32 [N], N >= 1, in a file without a name."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=(N,))


def parameters_of(head: Any) -> tuple[Tensor, Tensor | None]:
    return (head.weight.detach(), head.bias) if isinstance(head, nn.Linear) else head


def device_of(head: Any) -> torch.device:
    """Where a head computes; the CPU without one."""
    return torch.device("cpu") if head is None else parameters_of(head)[0].device
