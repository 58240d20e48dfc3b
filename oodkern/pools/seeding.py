"""Seeds of k-means: greedy k-means++ (Arthur and Vassilvitskii, 2007)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oodkern._precision import widen
from oodkern.backends import backend_for
from oodkern.ops._product import raw, register_fake


def among(distance: Tensor, uniform: Tensor) -> Tensor:
    """`greedy` where the squared distances [N, N] are held: by a kernel on the CPU, whose sums have another order."""
    N = len(distance)
    if distance.device.type == "cpu" and backend_for("select", distance, len(uniform)) == "native":
        return raw("native", "kmeans_seeds", distance, widen(uniform))

    def rows(samples: Tensor) -> Tensor:
        return distance.index_select(0, samples.flatten()).view(*samples.shape, N)

    return greedy(rows, N, uniform)


def greedy(rows: Callable[[Tensor], Tensor], N: int, uniform: Tensor) -> Tensor:
    """Seeds [R, k] of R restarts, from random numbers [k, R, candidates].

    `rows` gives the squared distances [..., N] from samples [...]. A candidate is drawn in proportion to its squared
    distance to the nearest seed so far, and the one is taken that leaves the least sum of these.
    """
    k, R, candidates = uniform.shape
    first = torch.arange(0, R * candidates, candidates, device=uniform.device)
    start = (uniform[0, :, 0] * N).long().clamp_(max=N - 1)
    closest = rows(start)
    places, best = [start[:, None].expand(R, candidates)], [first]
    for numbers in uniform.unbind()[1:]:
        places.append(drawn(closest, numbers, exact=closest.is_cuda))
        left = torch.minimum(rows(places[-1]), closest[:, None])
        best.append(left.sum(2).argmin(1) + first)
        closest = left.view(-1, N).index_select(0, best[-1])
    return torch.stack(places).view(k, -1).gather(1, torch.stack(best)).T


def drawn(weight: Tensor, uniform: Tensor, exact: bool) -> Tensor:
    """Columns [R, c] drawn in proportion to weights [R, N], not negative, by numbers [R, c] below 1.

    A device adds a cumulative sum of floats in an order that differs from call to call, and with it the rounding.
    `exact` adds integers instead: the largest weight is 2^61 / N at least, and the sum is below 2^62.
    """
    N = weight.shape[1]
    if exact:
        largest = weight.amax(1, keepdim=True).double()
        share = weight.double() / torch.where(largest > 0, largest, 1.0)
        weight, uniform = share.mul_(2.0 ** (62 - N.bit_length())).long(), uniform.double()
    reach = weight.cumsum(1)
    point = (reach[:, -1:] * uniform).to(reach.dtype)
    return torch.searchsorted(reach, point, right=True).clamp_(max=N - 1)


def _fake_seeds(distance: Tensor, uniform: Tensor) -> Tensor:
    return distance.new_empty(uniform.shape[1::-1], dtype=torch.int64)


register_fake("kmeans_seeds", _fake_seeds)
