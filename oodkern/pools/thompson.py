"""POEM: Thompson sampling of the boundary between what is known and the pool."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodkern.ops._checks import check_count
from oodkern.ops.top_k import TopK
from oodkern.pools.policy import Policy, check_scored
from oodkern.pools.ranks import drawn
from oodkern.pools.store import FeatureStore

ROWS = 8192  # of a chunk in float64: 32 MiB of 512 features


@dataclass(frozen=True)
class POEM(Policy):
    """The samples nearest to a boundary that is drawn from what a Bayesian linear regression leaves possible.

    With H [n, D] the features of in-distribution samples, whose targets y are +t, and of outliers, whose are -t:

        A = H^T H / sigma_noise + 1 / sigma,    mu = A^-1 H^T y / sigma_noise,    beta ~ N(mu, sigma A^-1)

    and chosen are the rows h of smallest |beta . h|; ascending by that, of equal ones the lower index first. Looks at
    no head: features should be such that beta needs no constant.

    Args:
        known: features of in-distribution samples by the model that the pool's are from, a Tensor [n, D] or a
            FeatureStore.
        sigma, sigma_noise: variances, of the prior and of the noise of the targets.
        target: t.
        outliers: how many rows of the pool the regression takes, drawn at random; as many as are known unless given,
            all where there are no more. Rows that are not finite are left out of it.

    Everything is computed in float64 on the CPU, chunk by chunk. Select draws the rows first and then beta.

    Source: Ming et al., POEM: Out-of-Distribution Detection with Posterior Sampling, ICML 2022, as its released code.
    """

    name: ClassVar[str] = "poem"
    known: Tensor | FeatureStore | None = field(default=None, repr=False, compare=False)
    sigma: float = 20.0
    sigma_noise: float = 0.5
    target: float = 3.0
    outliers: int | None = None

    def __post_init__(self) -> None:
        if self.known is not None and not isinstance(self.known, Tensor | FeatureStore):
            raise TypeError(f"known: expected a Tensor [n, D] or a FeatureStore, got {type(self.known).__name__}")
        for name in ("sigma", "sigma_noise", "target"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value}")
        if self.outliers is not None:
            check_count(self.outliers, "outliers", 1)

    def posterior(self, store: FeatureStore, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """mu [D] and the lower Cholesky factor L [D, D] of A: with e ~ N(0, 1), beta = mu + sqrt(sigma) L^-T e."""
        if self.known is None:
            raise ValueError(
                "known: expected features [n, D] of in-distribution samples, by the pool's model, got None"
            )
        known = FeatureStore.of(self.known) if isinstance(self.known, Tensor) else self.known
        D = store.dimension
        if known.dimension != D or len(known) == 0:
            raise ValueError(
                f"known: expected [n, {D}] with n >= 1 as the pool has, got {[len(known), known.dimension]}"
            )
        outliers = min(len(known) if self.outliers is None else self.outliers, len(store))
        chosen = drawn(len(store), outliers, generator).sort().values
        products, sums = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        for _, chunk in known.chunks(ROWS):
            h = chunk.double()
            products.addmm_(h.T, h)
            sums += h.sum(0)
        if not (sums.isfinite().all() and products.isfinite().all()):
            raise ValueError("known: expected finite features, got others")
        for rows in chosen.split(ROWS):
            h = store.rows(rows).double()
            h = h[h.square().sum(1).isfinite()]
            products.addmm_(h.T, h)
            sums -= h.sum(0)
        precision = products.div_(self.sigma_noise)
        precision.diagonal().add_(1 / self.sigma)
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve((sums * (self.target / self.sigma_noise))[:, None], factor)[:, 0]
        return mean, factor

    def _choose(self, store: FeatureStore, head: Any, count: int, generator: torch.Generator, scores: Any) -> Tensor:
        mean, factor = self.posterior(store, generator)
        normal = torch.randn(len(mean), dtype=torch.float64, generator=generator, device=generator.device).cpu()
        deviation = torch.linalg.solve_triangular(factor.T, normal[:, None], upper=True)[:, 0]
        beta = mean + math.sqrt(self.sigma) * deviation
        top = TopK(count, largest=False)
        for start, margin in _margins(store, beta):
            top.update(margin, start)
        check_scored(count, top.seen - top.nans)
        return top.result().indices


def _margins(store: FeatureStore, beta: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start, chunk in store.chunks(ROWS):
        yield start, (chunk.double() @ beta).abs()
