"""Room `select`: the k best scores of a pool that is larger than memory, chunk by chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodkern import reference
from oodkern.backends import backend_for
from oodkern.ops._checks import check_count, check_floating, score_dtype
from oodkern.ops._product import raw, register_fake

LEAST_SPARE = 64  # candidates beyond k, at least


class TopKResult(NamedTuple):
    """values, and indices int64, the best first."""

    values: Tensor
    indices: Tensor


class TopK:
    """The exact k best of a stream of scores, whatever the chunks and their order.

        top = TopK(1000)
        for offset, scores in ...:      # scores[i] is that of sample offset + i
            top.update(scores, offset)
        values, indices = top.result()

    Args:
        k: how many to keep, 1 or more.
        largest: keep the largest scores, or the smallest.

    Of equal scores the one with the lower index is better, so the result is one and the same for every way of cutting
    the stream into chunks, every order of the chunks and every number of threads. A NaN is no score: it is never kept,
    and `nans` counts how many there were. Infinities are scores.

    Memory: 2 k candidates (and as many for each thread while it scans; on a GPU as many again and those of a chunk,
    up to 32,768 for each multiprocessor). A chunk is read once; what is not better than the k-th best so far costs
    a comparison. On a GPU `update` waits for nothing and can be captured in a CUDA graph; `result`, `nans` and
    `state_dict` wait for it. Not differentiable.

    Attributes:
        seen: how many scores were given so far, NaN included.
        nans: how many of them were NaN.
    """

    def __init__(self, k: int, largest: bool = True) -> None:
        check_count(k, "k", 1)
        if not isinstance(largest, bool):
            raise TypeError(f"largest: expected True or False, got {type(largest).__name__}")
        self.k, self.largest, self.seen = k, largest, 0
        self._values: Tensor | None = None  # the candidates, and room for more
        self._indices = self._state = torch.empty(0, dtype=torch.int64)

    @property
    def nans(self) -> int:
        return 0 if self._values is None else int(self._state[2])

    @torch.no_grad()
    def update(self, scores: Tensor, offset: int) -> None:
        """Takes in the scores [n] of samples offset, offset + 1, ... Each sample is to be given once.

        The first update decides the device and the precision (float64 for float64 scores, float32 for the others,
        which holds 16-bit scores exactly). Raises TypeError or ValueError for an argument of the wrong kind or shape.
        """
        check_floating(scores, "scores")
        if scores.dim() != 1:
            raise ValueError(f"scores: expected [n], one number a sample, got {list(scores.shape)}")
        check_count(offset, "offset", 0)
        dtype = score_dtype(scores)
        if self._values is None:
            self._hold(scores.new_empty(0, dtype=dtype), scores.new_empty(0, dtype=torch.int64), 0)
        assert self._values is not None
        if (dtype, scores.device) != (self._values.dtype, self._values.device):
            held = f"{str(self._values.dtype).removeprefix('torch.')} on {self._values.device}"
            name = f"{str(scores.dtype).removeprefix('torch.')} on {scores.device}"
            raise ValueError(f"scores: expected what the first update gave, {held}, got {name}")
        backend = backend_for("extremes", scores, 0)
        if backend == "reference":
            self._update(reference.widen(scores), offset)
        else:
            state = (self._values, self._indices, self._state)
            raw(backend, "top_k_update", scores.detach(), offset, self.k, self.largest, *state)
        self.seen += len(scores)

    def result(self) -> TopKResult:
        """(values, indices), the best first: k of them, or as many as there were scores. The stream may go on."""
        if self._values is None:
            return TopKResult(torch.empty(0), torch.empty(0, dtype=torch.int64))
        count = int(self._state[0])
        return TopKResult(*reference.best(self._values[:count], self._indices[:count], self.k, self.largest))

    def state_dict(self) -> dict[str, Any]:
        """What a scan that was stopped goes on from: numbers and two tensors of at most k elements."""
        values, indices = self.result()
        return {
            "k": self.k,
            "largest": self.largest,
            "seen": self.seen,
            "nans": self.nans,
            "values": values,
            "indices": indices,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Raises ValueError where k or largest is another."""
        for name in ("k", "largest"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: expected {getattr(self, name)} as this TopK has, got {state[name]}")
        self.seen = state["seen"]
        if self.seen == 0:
            self._values = None
        else:
            self._hold(state["values"], state["indices"], state["nans"])

    def _hold(self, values: Tensor, indices: Tensor, nans: int) -> None:
        """Candidates, the best first, in tensors with room for more."""
        room, count = self.k + max(self.k, LEAST_SPARE), len(values)
        self._values, self._indices = values.new_empty(room), indices.new_empty(room)
        self._values[:count], self._indices[:count] = values, indices
        # Where the scores are; zeros and numbers that are filled in wait for no device.
        self._state = values.new_zeros(3, dtype=torch.int64)
        for place, number in enumerate((count, int(count == self.k), nans)):
            if number:
                self._state[place] = number

    def _update(self, scores: Tensor, offset: int) -> None:
        """With PyTorch alone."""
        assert self._values is not None
        count, has_bar, nans = self._state.tolist()
        unordered = scores.isnan()
        kept = ~unordered
        if has_bar:
            bar = self._values[self.k - 1]
            kept &= scores >= bar if self.largest else scores <= bar
        found = kept.nonzero().squeeze(1)
        values = torch.cat([self._values[:count], scores[found]])
        indices = torch.cat([self._indices[:count], found + offset])
        self._hold(*reference.best(values, indices, self.k, self.largest), nans + int(unordered.sum()))


def _fake_update(
    scores: Tensor, offset: int, k: int, largest: bool, values: Tensor, indices: Tensor, state: Tensor
) -> None:
    pass


register_fake("top_k_update", _fake_update)
