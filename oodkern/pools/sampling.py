"""Which outliers of a pool are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from oodkern.ops._checks import INTEGERS, check_count, check_floating, check_tensor
from oodkern.ops._product import check_beside, check_matrix
from oodkern.ops.select import cluster_extremes
from oodkern.pools.clustering import check_generator, kmeans
from oodkern.reference import unit, widen


@torch.no_grad()
def cluster_sample(
    features: Tensor | None,
    energy: Tensor,
    count: int,
    clusters: int,
    generator: torch.Generator,
    two_way: bool = True,
    *,
    clustering: Tensor | None = None,
    available: Tensor | None = None,
    per_side: int | None = None,
) -> Tensor:
    """The outliers of a GReg+ step: of each cluster those of lowest and of highest energy, and random ones.

        index = cluster_sample(features, energy, 128, 64, generator)

        found = kmeans(unit_features, 64, generator)              # clusters of cached features
        index = cluster_sample(None, energy, 128, 64, generator, clustering=found.index)

    Args:
        features: [N, D], floating and finite; their rows are divided by their norms and clustered by `kmeans` with its
            defaults. Not looked at, and None will do, where `clustering` is given.
        energy: [N], floating, E = -logsumexp of the logits; low = in-distribution, so low is hard.
        count: how many to take, 0..N (and no more than are available).
        clusters: how many clusters there are, or to make, at most N then.
        generator: the source of all random numbers, on any device.
        two_way: take those of highest energy, which are told apart already, beside those of lowest.
        clustering: [N] integers in 0..clusters-1, the cluster of each sample, for example one of a pass before.
        available: [N] bool, which samples may be taken; all, unless given. The others still shape the clusters.
        per_side: how many samples of each end of a cluster; max(count // 2 // clusters, 1) unless given: count // 2 is
            the released code's batch, of which it takes int(batch / clusters).

    Returns:
        [count] int64, no index twice. First those of lowest energy, cluster after cluster, the lowest first; then, with
        `two_way`, those of highest energy that are not among them; then the rest in random order. Of equal energies
        the lower index comes first. Where the clusters have more than `count` the later ones are left out. A sample
        whose energy is NaN is at no end, and is among the rest only where no other is left.

    Not differentiable. Nothing is waited for but what `kmeans` waits for, and `available` for its number. Raises
    TypeError or ValueError for an argument of the wrong kind or shape, or where too few samples are available.

    Source: Sharifi et al., ECCV 2024 (GReg+), as in its released code.
    """
    check_floating(energy, "energy")
    if energy.dim() != 1:
        raise ValueError(f"energy: expected [N], one number a sample, got {list(energy.shape)}")
    N = len(energy)
    check_count(count, "count", 0)
    check_count(clusters, "clusters", 1)
    check_generator(generator)
    if not isinstance(two_way, bool):
        raise TypeError(f"two_way: expected True or False, got {type(two_way).__name__}")
    if per_side is None:
        per_side = max(count // 2 // clusters, 1)
    check_count(per_side, "per_side", 1)
    if count > N:
        raise ValueError(f"count: expected at most {N}, the number of samples, got {count}")
    if available is not None:
        _check_row(available, "available", energy, (torch.bool,), "bool")
        if count > (most := int(available.sum())):
            raise ValueError(f"count: expected at most {most}, the number of samples available, got {count}")
    if clustering is not None:
        _check_row(clustering, "clustering", energy, INTEGERS, "integers")
    else:
        if features is None:
            raise ValueError("features: expected [N, D] where no clustering is given, got None")
        check_matrix(features, "features")
        if len(features) != N:
            raise ValueError(f"features: expected {N} rows, one a number of energy, got {list(features.shape)}")
        check_beside(features, "features", energy, "energy", dtype=False)
        clustering = kmeans(unit(widen(features)), clusters, generator).index

    # NaN is no score: cluster_extremes passes over it.
    known = widen(energy) if available is None else widen(energy).masked_fill(~available, torch.nan)
    lowest, highest = cluster_extremes(known, clustering, clusters, per_side)
    ends = torch.cat([lowest, highest] if two_way else [lowest]).flatten()
    # The place of each sample: that of its first mention among the ends, or a random one after them; NaN after those,
    # and what is not available last. So no number of samples has to be known on the way.
    place = torch.randperm(N, generator=generator, device=generator.device).to(energy.device) + len(ends)
    place += N * known.isnan()
    if available is not None:
        place += N * ~available
    mention = torch.arange(len(ends), device=energy.device)
    nowhere = torch.where(ends < 0, N, ends)
    place = torch.cat([place, place.new_zeros(1)]).scatter_reduce_(0, nowhere, mention, "amin")[:N]
    return place.argsort()[:count]


def _check_row(value: Tensor, name: str, energy: Tensor, dtypes: tuple[torch.dtype, ...], kind: str) -> None:
    check_tensor(value, name)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {kind}, got {str(value.dtype).removeprefix('torch.')}")
    if value.shape != energy.shape:
        raise ValueError(f"{name}: expected {list(energy.shape)} as energy is, got {list(value.shape)}")
    check_beside(value, name, energy, "energy", dtype=False)
