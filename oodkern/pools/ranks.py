"""Ranks of scores that are larger than memory: which samples have them, exactly and without a sort of all.

A float32 has an unsigned integer of the same order: its bits with the sign flipped where it is positive, all of them
flipped where it is negative. -0.0 is 0.0 first, and every NaN is the largest integer, so that they come last. Two
passes then find the score of a rank: one counts the high halves of the keys, 65,536 of them, the other the low halves
of the keys whose high half holds the rank. A third takes what lies between two ranks. Of equal scores, NaN among
them, the lower index comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from oodkern.ops._checks import check_count

ROWS = 1 << 18  # scores of a chunk: 1 MiB
NAN = np.uint32(0xFFFFFFFF)
SIGN = np.uint32(0x80000000)
HALVES = 1 << 16


def keys_of(scores: np.ndarray) -> np.ndarray:
    """uint32 keys of float32 scores, in the same order."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 = 0.0
    keys = bits ^ np.where(bits >= SIGN, NAN, SIGN)
    keys[np.isnan(scores)] = NAN
    return keys


def rank_slice(scores: np.ndarray, start: int, stop: int) -> Tensor:
    """The samples of ranks start..stop-1 of the scores in ascending order.

    Args:
        scores: [N] float32, in memory or mapped. NaN are last.
        start, stop: 0 <= start <= stop <= N.

    Returns:
        [stop - start] int64, ascending by score, of equal scores the lower index first.

    Exact; three passes over the scores, in memory for a chunk and the result. Raises TypeError or ValueError for scores
    of another kind and for ranks that there are not.
    """
    found = np.concatenate([np.empty(0, np.int64), *rank_members(scores, start, stop)])
    return torch.from_numpy(found[np.argsort(keys_of(scores[found]), kind="stable")])


def rank_members(scores: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    """What `rank_slice` takes, in ascending order of the indices and in pieces: of memory for a chunk alone."""
    check_scores(scores)
    N = len(scores)
    check_count(start, "start", 0)
    check_count(stop, "stop", start)
    if stop > N:
        raise ValueError(f"stop: expected at most {N}, the number of scores, got {stop}")
    return _members(scores, start, stop) if stop > start else iter(())


def check_scores(scores: np.ndarray) -> None:
    if not isinstance(scores, np.ndarray):
        raise TypeError(f"scores: expected a NumPy array, got {type(scores).__name__}")
    if scores.dtype != np.float32:
        raise TypeError(f"scores: expected float32, got {scores.dtype}")
    if scores.ndim != 1:
        raise ValueError(f"scores: expected [N], one number a sample, got {list(scores.shape)}")


def scored(scores: np.ndarray) -> int:
    """How many scores are numbers."""
    check_scores(scores)
    return len(scores) - sum(int(np.isnan(chunk).sum()) for _, chunk in _chunks(scores))


def quantile_rank(quantile: float, count: int, up: bool = False) -> int:
    """The rank at which a quantile q of `count` scores, those that are numbers, begins or ends: floor(q count) as a
    start, and with `up` ceil(q count) as a stop, so that a window of quantiles has all ranks that it touches.

    q is what it is written as: 0.07 of 100 is 7, though the product of the two floats is above it.
    """
    product = quantile * count
    whole = round(product)
    if math.isclose(product, whole, rel_tol=1e-12, abs_tol=0):
        return whole
    return math.ceil(product) if up else math.floor(product)


def taken(members: Iterable[np.ndarray], ordinals: Tensor) -> Tensor:
    """Those members, given in pieces, that stand at `ordinals` (unique), in the order of these."""
    order = ordinals.argsort()
    wanted = ordinals[order].numpy()
    found, done, passed = np.empty(len(wanted), np.int64), 0, 0
    for piece in members:
        upto = int(np.searchsorted(wanted, passed + len(piece)))
        found[done:upto] = piece[wanted[done:upto] - passed]
        done, passed = upto, passed + len(piece)
        if done == len(wanted):
            break
    result = torch.empty_like(ordinals)
    result[order] = torch.from_numpy(found)
    return result


def drawn(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers of 0..total-1 in random order, every such row of numbers as likely as any other.

    Where few are drawn of many, numbers are drawn one after the other and those that were there before passed over,
    in memory for `count` instead of `total`.
    """
    if count * 8 >= total:
        return torch.randperm(total, generator=generator, device=generator.device)[:count].cpu()
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(total, (count - len(found),), generator=generator, device=generator.device)
        found = _first_mentions(torch.cat([found, more.cpu()]))
    return found


def _first_mentions(numbers: Tensor) -> Tensor:
    ordered, place = numbers.sort(stable=True)
    first = torch.ones(len(numbers), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return numbers[place[first].sort().values]


def _chunks(scores: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for offset in range(0, len(scores), ROWS):
        yield offset, np.asarray(scores[offset : offset + ROWS])


def _members(scores: np.ndarray, start: int, stop: int) -> Iterator[np.ndarray]:
    first, last = _at_ranks(scores, (start, stop - 1))
    seen = {first[0]: 0, last[0]: 0}  # how many had the boundaries' keys so far
    for offset, chunk in _chunks(scores):
        keys = keys_of(chunk)
        inside = (keys > first[0]) & (keys < last[0])
        for key, count in seen.items():
            equal = np.flatnonzero(keys == key)
            low = start - first[1] if key == first[0] else 0
            high = stop - last[1] if key == last[0] else len(scores)
            inside[equal[max(low - count, 0) : max(high - count, 0)]] = True
            seen[key] += len(equal)
        yield np.flatnonzero(inside) + offset


def _at_ranks(scores: np.ndarray, ranks: tuple[int, int]) -> list[tuple[int, int]]:
    """Of each rank, the key of its score and how many keys are smaller."""
    high = np.zeros(HALVES, np.int64)
    for _, chunk in _chunks(scores):
        high += np.bincount(keys_of(chunk) >> 16, minlength=HALVES)
    ends = high.cumsum()
    buckets = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    low = {bucket: np.zeros(HALVES, np.int64) for bucket in buckets}
    for _, chunk in _chunks(scores):
        keys = keys_of(chunk)
        for bucket, counts in low.items():
            counts += np.bincount(keys[keys >> 16 == bucket] & np.uint32(HALVES - 1), minlength=HALVES)
    found = []
    for rank, bucket in zip(ranks, buckets, strict=True):
        before = int(ends[bucket] - high[bucket])
        within = low[bucket].cumsum()
        half = int(np.searchsorted(within, rank - before, side="right"))
        found.append(((bucket << 16) + half, before + int(within[half] - low[bucket][half])))
    return found
