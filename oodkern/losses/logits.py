"""Logits as the terms of a loss see them: given, or fused with the product that makes them and never stored."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from oodkern import reference
from oodkern._precision import unrounded
from oodkern.losses._selection import Select
from oodkern.losses._slopes import Key
from oodkern.ops import Upstream, alignment, energy, joint_energy, linear_energy, linear_joint_energy
from oodkern.ops._checks import score_dtype


class Logits:
    """Logits z [N, K] of rows, by the numbers [N] that terms are made of: float32, float64 of float64 logits.

    Energies are formed once, however often they are asked for.
    """

    classes: int

    def __init__(self) -> None:
        self._formed: list[tuple[str, float, Tensor]] = []

    def geometry(self) -> tuple[Tensor, Tensor]:
        """The features [N, D] of the rows and the class weights [K, D], these without a gradient, in one dtype."""
        raise NotImplementedError

    def alignment(self) -> Tensor:
        """mean_c |cos(x, w_c)|. Autocast has been at the features already, or is not to be at them."""
        return unrounded(alignment)(*self.geometry())

    def own_cosine(self, target: Tensor) -> Tensor:
        """cos(x, w_y) of the row's class, [N]. Without meaning for rows with targets < 0."""
        features, weight = self.geometry()
        if not len(weight):
            return reference.widen(features).sum(-1)
        own = weight[target.long().clamp_min(0)]
        return (reference.unit(reference.widen(features)) * reference.unit(reference.widen(own))).sum(-1)

    def formed(self, score: str, temperature: float) -> Tensor | None:
        # Compared, not hashed: under torch.compile a temperature may be symbolic.
        return next((value for name, at, value in self._formed if name == score and at == temperature), None)

    def form(self, score: str, temperature: float) -> Tensor:
        raise NotImplementedError

    def score(self, score: str, temperature: float) -> Tensor:
        value = self.formed(score, temperature)
        if value is None:
            value = self.form(score, temperature)
            self._formed.append((score, temperature, value))
        return value

    def energy(self, temperature: float = 1.0) -> Tensor:
        """-T logsumexp(z / T)."""
        return self.score("energy", temperature)

    def joint_energy(self) -> Tensor:
        """sum_c softplus(z_c)."""
        return self.score("joint_energy", 1.0)

    def chosen(self) -> Tensor:
        """z_y of the row's class; in multi-label tasks sum_c y_c z_c. Without meaning for rows with targets < 0."""
        raise NotImplementedError

    def mean(self) -> Tensor:
        """mean_c z_c. To be asked for before the energies: see `FusedLogits`."""
        raise NotImplementedError


class GivenLogits(Logits):
    """Of logits [N, K], and of the targets of in-distribution rows: [N], multi-label [N, K].

    Losses of directions also need the features [N, D] and the class weights [K, D] that made them.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor | None = None,
        features: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.logits, self.target, self.classes = logits, target, logits.shape[-1]
        self.features, self.weight = features, weight

    def geometry(self) -> tuple[Tensor, Tensor]:
        assert self.features is not None
        assert self.weight is not None
        return self.features, self.weight.detach().to(self.features.dtype)

    def form(self, score: str, temperature: float) -> Tensor:
        return energy(self.logits, temperature) if score == "energy" else joint_energy(self.logits)

    def chosen(self) -> Tensor:
        assert self.target is not None
        dtype = score_dtype(self.logits)
        if self.target.dim() == 2:
            return (self.logits * self.target.to(self.logits.dtype)).sum(-1, dtype=dtype)
        return self.logits.gather(-1, self.target.long().clamp_min(0).unsqueeze(-1)).squeeze(-1).to(dtype)

    def mean(self) -> Tensor:
        return self.logits.mean(-1, dtype=score_dtype(self.logits))


class Head:
    """A linear head whose weight [K, D] and bias [K] pass through every selection of their rows.

    The energies that are formed afterwards are formed of what came through, so that the gradients join: see
    `_selection`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.directions = weight.detach()

    def select(self, features: Tensor, selection: Tensor | None) -> Tensor:
        """x . (A W) + A b of each row, [N], in float32 at least. Selections: see `_selection`."""
        self.weight, rows = Select.apply(self.weight, selection)
        value = (reference.widen(features) * rows).sum(-1)
        if self.bias is not None:
            bias, rows = Select.apply(self.bias.unsqueeze(1), selection)
            self.bias, value = bias.squeeze(1), value + rows.squeeze(1)
        return value


class FusedLogits(Logits):
    """Of features [N, D] @ weight [K, D].T + bias [K], which is not formed: see `oodkern.linear_energy`.

    What is linear in the logits is a product with a sum of rows of the weight, in float32 at least:
    z_y = x . w_y + b_y, sum_c y_c z_c = x . (y W) + y . b, mean_c z_c = x . mean_c w_c + mean_c b_c. Asked for after
    an energy it is as right, and costs one more [K, D] in the backward pass; that of the targets is formed at once.
    """

    def __init__(self, features: Tensor, head: Head, target: Tensor | None = None) -> None:
        super().__init__()
        self.features, self.head, self.classes = features, head, len(head.weight)
        self.foreseen: Mapping[Key, Upstream] = {}
        self._chosen = None
        if target is not None and (target.dim() == 2 or self.classes):
            self._chosen = head.select(features, target if target.dim() == 2 else target.long().clamp_min(0))

    def geometry(self) -> tuple[Tensor, Tensor]:
        return self.features, self.head.directions.to(self.features.dtype)

    def form(self, score: str, temperature: float) -> Tensor:
        # Without any, nothing is looked up: under torch.compile a temperature may be symbolic.
        upstream = self.foreseen.get((score, temperature)) if self.foreseen else None
        if score == "energy":
            return linear_energy(self.features, self.head.weight, self.head.bias, temperature, upstream=upstream)
        return linear_joint_energy(self.features, self.head.weight, self.head.bias, upstream=upstream)

    def chosen(self) -> Tensor:
        assert self._chosen is not None
        return self._chosen

    def mean(self) -> Tensor:
        return self.head.select(self.features, None)


class FusedPart(FusedLogits):
    """Some rows of others, whose energies are slices of those of all: one product, one gradient of the weight.

    What outliers (rows without a target) are asked for is formed for all rows, since in-distribution ones are asked
    for it too; what these alone are asked for, for these alone. Outliers' terms come first for that.
    """

    def __init__(self, whole: FusedLogits, rows: slice, target: Tensor | None = None) -> None:
        super().__init__(whole.features[rows], whole.head, target)
        self.whole, self.rows, self.leads = whole, rows, target is None
        self.foreseen = {key: upstream.rows(rows) for key, upstream in whole.foreseen.items()}

    def form(self, score: str, temperature: float) -> Tensor:
        shared = self.whole.score(score, temperature) if self.leads else self.whole.formed(score, temperature)
        return super().form(score, temperature) if shared is None else shared[self.rows]


def fused_logits(
    features: Tensor, head: Head, target: Tensor, n_id: int | None, foreseen: Mapping[Key, Upstream]
) -> tuple[FusedLogits, FusedLogits]:
    """The logits of in-distribution rows and of outliers, the last ones; with `n_id` None twice those of all rows."""
    whole = FusedLogits(features, head, target if n_id is None else None)
    whole.foreseen = foreseen
    if n_id is None:
        return whole, whole
    return FusedPart(whole, slice(None, n_id), target), FusedPart(whole, slice(n_id, None))


def cross_entropy(logits: Logits) -> Tensor:
    """logsumexp(z) - z_y of each row, [N]; rows with target < 0 get a number that means nothing.

    The difference of two numbers as large as the logits: its absolute error is theirs, about |E| float32 units in
    the last place (4e-6 for logits of 30), where torch's cross_entropy subtracts the maximum first (3e-7) and keeps
    a copy of the logits to do so.
    """
    if logits.classes == 0:
        return logits.energy()
    return -logits.energy() - logits.chosen()


def binary_cross_entropy(logits: Logits) -> Tensor:
    """mean over labels of softplus(z_c) - y_c z_c, each row, [N]: one JointEnergy and one product."""
    return (logits.joint_energy() - logits.chosen()) / max(logits.classes, 1)
