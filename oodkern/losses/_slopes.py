"""What a loss's slope in the scores of its rows will be, so that gradients are formed with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oodkern.ops import Upstream

Key = tuple[str, float]  # a score, and its temperature


@dataclass(frozen=True)
class Slope:
    """Of linear S + |hinge| relu(+-(S - margin))^2 in the score S of a row, before the reduction: see `Upstream`."""

    linear: float = 0.0
    hinge: float = 0.0
    margin: float = 0.0


Slopes = Mapping[Key, Slope]


def upstreams(slopes: Iterable[tuple[Slopes, Tensor]]) -> dict[Key, Upstream]:
    """The upstream of each score, of parts of the rows and what each row counts in them, [N]: 0 in other parts."""
    parts = list(slopes)

    def combined(key: Key) -> Upstream:
        of = [(part.get(key, Slope()), weight) for part, weight in parts]
        linear = torch.stack([slope.linear * weight for slope, weight in of]).sum(0)
        if all(slope.hinge == 0 for slope, _ in of):
            return Upstream(linear)
        hinge = torch.stack([slope.hinge * weight for slope, weight in of]).sum(0)
        margin = torch.stack([slope.margin * (weight != 0).to(weight) for slope, weight in of]).sum(0)
        return Upstream(linear, hinge, margin)

    return {key: combined(key) for key in {key for part, _ in parts for key in part}}
