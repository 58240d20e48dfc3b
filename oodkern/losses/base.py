"""What all losses share: the calling styles, the reductions, the classification term."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oodkern.backends import backend_for
from oodkern.losses._checks import check_counts, check_fused, check_logit_rows, check_target, outlier_rows
from oodkern.losses._slopes import Key, Slope, Slopes, upstreams
from oodkern.losses.logits import GivenLogits, Head, Logits, binary_cross_entropy, cross_entropy, fused_logits
from oodkern.ops import Upstream
from oodkern.ops._checks import check_choice, score_dtype
from oodkern.ops._foreseen import can_foresee
from oodkern.ops._product import autocast
from oodkern.processes import is_sharded

REDUCTIONS = ("mean", "sum", "batchmean", "none")
COUPLED = REDUCTIONS[:-1]  # those of losses whose terms are not all of rows

# A term of a loss: its weight and its value for each row.
Terms = Mapping[str, tuple[float, Tensor]]
Loss = Tensor | tuple[Tensor, dict[str, Tensor]]


class OutlierLoss(nn.Module):
    """A loss of in-distribution rows and a loss of outlier rows, in two calling styles.

    Split: `loss(logits_id, target_id, logits_ood)`. Mixed: `loss(logits, target)`, where a row is an outlier if
    its target is negative; in multi-label tasks if its targets are all negative, or where `is_ood` is true. Both
    also from features and the head that makes logits of them, without logits: `from_features`.

    Reductions, with the rows' losses weighted by the loss's own weights:
        mean: mean over the ID part + mean over the OOD part (an empty part counts 0 and keeps the graph)
        sum: sum over all rows
        batchmean: the sum divided by the number of all rows
        none: one number a row, in the order of the rows (split: ID first)
    """

    def __init__(self, reduction: str, multi_label: bool, reductions: tuple[str, ...] = REDUCTIONS) -> None:
        super().__init__()
        self.reduction = check_choice(reduction, "reduction", reductions)
        self.multi_label = bool(multi_label)

    @property
    def separable(self) -> bool:
        """Whether loss(id, y, ood) = loss(id, y, nothing) + loss(nothing, nothing, ood).

        The two can then be formed and differentiated one after the other.
        """
        return self.reduction in ("mean", "sum")

    def id_terms(self, logits: Logits, target: Tensor, skip: Tensor | None = None) -> Terms:
        """The terms of in-distribution rows.

        In a mixed batch `skip` marks the rows of outliers, whose numbers are left out afterwards; a term whose slope
        is not finite where the numbers are infinite has to leave them out itself.
        """
        raise NotImplementedError

    def ood_terms(self, logits: Logits, skip: Tensor | None = None) -> Terms:
        """The terms of outlier rows; `skip` marks the in-distribution ones."""
        raise NotImplementedError

    def pair_terms(self, known: Logits, unknown: Logits, target: Tensor, is_ood: Tensor | None) -> Terms:
        """Terms that couple ID rows with outliers: scalars, means over pairs of them.

        In a mixed batch both arguments are the whole of it, and `is_ood` tells its rows apart. A loss that has such a
        term is not separable, and has no reduction "none".
        """
        return {}

    def prepare(self, weight: Tensor) -> None:
        """What a loss makes of the head's weight [K, D] beforehand: of checked arguments, not yet cast by autocast."""

    def slopes(self, classes: int) -> tuple[Slopes, Slopes]:
        """The slopes of the ID rows' terms and of the outliers' in their scores, where they can be foreseen.

        Gradients are then formed with the scores, of three products whatever N. What is missing or wrong here
        costs time, not correctness: see `oodkern.ops.Upstream`.
        """
        return {}, {}

    def classification_slope(self, classes: int) -> Slopes:
        """Of `classification`."""
        if self.multi_label:
            return {("joint_energy", 1.0): Slope(linear=1 / max(classes, 1))}
        return {("energy", 1.0): Slope(linear=-1.0)}

    def classification(self, logits: Logits) -> Terms:
        """The term that every loss has: `ce`, or `bce`."""
        if self.multi_label:
            return {"bce": (1.0, binary_cross_entropy(logits))}
        return {"ce": (1.0, cross_entropy(logits))}

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        logits_ood: Tensor | None = None,
        *,
        is_ood: Tensor | None = None,
        counts: tuple[int, int] | None = None,
        return_parts: bool = False,
    ) -> Loss:
        """The loss.

        Args:
            logits: [N, K] of the in-distribution rows, or of all rows in the mixed style.
            target: [N] integers in 0..K-1, negative for outliers (mixed style); multi-label [N, K] of 0 and 1.
            logits_ood: [M, K] of the outliers, which makes the style split.
            is_ood: [N] bool, mixed multi-label style: which rows are outliers.
            counts: in-distribution rows and outliers of the whole batch, where these rows are a part of it: means are
                over so many, and values and gradients of the parts add up to those of the whole.
            return_parts: also return each term before its weight, reduced as the loss is, detached.

        Returns:
            A scalar ([N + M] or [N] with reduction "none"), float32 (float64 for float64 logits); with
            `return_parts` a tuple of it and a dict. A term that no row has is 0. Raises TypeError or ValueError for an
            argument of the wrong kind or shape, and for `counts` where the loss is not `separable`.
        """
        check_logit_rows(logits, logits_ood)
        N, K = logits.shape
        check_target(target, is_ood, (N, K), self.multi_label, logits_ood is not None, logits, "logits")
        check_counts(counts, self.separable)
        if logits_ood is not None:
            known, unknown = GivenLogits(logits, target), GivenLogits(logits_ood)
            return self._split(known, target, unknown, (N, len(logits_ood)), counts, return_parts)
        is_ood = outlier_rows(target, is_ood, self.multi_label)
        if self.multi_label:
            target = target.clamp_min(0)
        return self._mixed(GivenLogits(logits, target), target, is_ood, counts, return_parts)

    def from_features(
        self,
        features: Tensor,
        head_weight: Tensor,
        head_bias: Tensor | None,
        target: Tensor,
        n_id: int | None = None,
        *,
        is_ood: Tensor | None = None,
        counts: tuple[int, int] | None = None,
        return_parts: bool = False,
    ) -> Loss:
        """The loss of the logits features @ head_weight.T + head_bias, which are never formed.

        With LSE = -oodkern.linear_energy and wbar, bbar the means over the classes: CE = LSE - (x . w_y + b_y), the
        uniform cross-entropy LSE - (x . wbar + bbar), BCE = (oodkern.linear_joint_energy - x . (y W) - y . b) / K.
        Beyond arguments and gradients it holds a few [N, D], and what `linear_energy` does.

        Args:
            features: [N, D], float64, float32, bfloat16 or float16: in-distribution rows, then outliers; with
                `n_id` None in any order.
            head_weight: [K, D], in the dtype of the features (under autocast all three are cast to its dtype); or a
                DTensor, Shard(0) on a mesh of one dimension. Each process then gives the same features and targets,
                forms the scores of its own classes, and gets the same loss and the gradients of its own classes: in
                the features a part, whose sum over the processes is the whole. See `oodkern.losses.parallel`.
            head_bias: [K] or None; placed as head_weight is.
            target: [n_id] integers in 0..K-1, multi-label [n_id, K] of 0 and 1. With `n_id` None of all rows, and
                negative for outliers.
            n_id: how many rows are in-distribution; None: they are told by their targets, or by `is_ood`.
            is_ood, counts, return_parts: as in `forward`.

        Returns:
            What `forward` returns for these logits in float32 (float64 for float64 features): of 16-bit features and
            weights none is rounded to 16 bits. Differentiable twice in features, head_weight and head_bias (a sharded
            head: once), whose gradients have their dtypes. Raises TypeError or ValueError for an argument of the wrong
            kind, shape or placement.
        """
        check_fused(features, head_weight, head_bias, n_id)
        N, K = len(features), len(head_weight)
        rows = N if n_id is None else n_id
        check_target(target, is_ood, (rows, K), self.multi_label, n_id is not None, features, "features")
        check_counts(counts, self.separable)
        self.prepare(head_weight)
        if n_id is not None:
            is_ood = torch.arange(N, device=features.device) >= n_id
        is_ood = outlier_rows(target, is_ood, self.multi_label)
        if is_sharded(head_weight):
            from oodkern.losses.parallel import parallel_logits

            known, unknown = parallel_logits(features, head_weight, head_bias, target, n_id)
        else:
            features, weight, bias = autocast(features, head_weight, head_bias)
            head = Head(weight, bias)
            foreseen = self._foreseen(features, head, K, is_ood, counts)
            known, unknown = fused_logits(features, head, target, n_id, foreseen)
        if n_id is None:
            return self._mixed(known, target, is_ood, counts, return_parts)
        return self._split(known, target, unknown, (n_id, N - n_id), counts, return_parts)

    def _foreseen(
        self, features: Tensor, head: Head, classes: int, is_ood: Tensor, counts: tuple[int, int] | None
    ) -> dict[Key, Upstream]:
        """The upstream gradients of the scores of all rows, times one factor."""
        backend = backend_for("linear_energy", features, classes)
        if self.reduction == "none" or not can_foresee(backend, features, head.weight, head.bias):
            return {}
        parts = [rows.to(score_dtype(features)) for rows in (~is_ood, is_ood)]
        if self.reduction == "mean":
            whole = [rows.sum() for rows in parts] if counts is None else map(parts[0].new_tensor, counts)
            parts = [rows / count.clamp_min(1) for rows, count in zip(parts, whole, strict=True)]
        elif self.reduction == "batchmean":
            parts = [rows / max(len(rows) if counts is None else sum(counts), 1) for rows in parts]
        return upstreams(zip(self.slopes(classes), parts, strict=True))

    def _split(
        self,
        known: Logits,
        target: Tensor,
        unknown: Logits,
        lengths: tuple[Any, Any],
        counts: tuple[int, int] | None,
        return_parts: bool,
    ) -> Loss:
        ood_terms = self.ood_terms(unknown)  # first: see FusedPart
        id_terms = self.id_terms(known, target)
        pairs = self.pair_terms(known, unknown, target, None)
        return self._reduce(id_terms, ood_terms, pairs, lengths, counts or lengths, None, return_parts)

    def _mixed(
        self, logits: Logits, target: Tensor, is_ood: Tensor, counts: tuple[int, int] | None, return_parts: bool
    ) -> Loss:
        ood_terms = self.ood_terms(logits, ~is_ood)
        id_terms = self.id_terms(logits, target, is_ood)
        pairs = self.pair_terms(logits, logits, target, is_ood)
        lengths = len(target), len(target)
        return self._reduce(
            id_terms, ood_terms, pairs, lengths, counts or ((~is_ood).sum(), is_ood.sum()), is_ood, return_parts
        )

    def _reduce(
        self,
        id_terms: Terms,
        ood_terms: Terms,
        pairs: Terms,
        lengths: tuple[Any, Any],
        counts: tuple[Any, Any],
        is_ood: Tensor | None,
        return_parts: bool,
    ) -> Loss:
        def keep(rows: Tensor, outliers: bool) -> Tensor:
            if is_ood is None:
                return rows
            return torch.where(is_ood if outliers else ~is_ood, rows, 0.0)

        def divisor(count: int | Tensor) -> int | Tensor:
            """What a sum over so many rows is divided by."""
            if self.reduction == "sum":
                return 1
            if self.reduction == "batchmean":
                count = counts[0] + counts[1]
            return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)

        def reduce(rows: Tensor, count: int | Tensor) -> Tensor:
            return rows if self.reduction == "none" else rows.sum() / divisor(count)

        kept = [
            {name: (weight, keep(rows, outliers)) for name, (weight, rows) in terms.items()}
            for terms, outliers in ((id_terms, False), (ood_terms, True))
        ]

        def share(mean: Tensor) -> Tensor:
            """A mean over pairs as the mean over the outliers of each one's mean over its partners."""
            count = counts[1]  # a quotient of integer tensors would be float32, whatever the mean is
            return mean * ((count.to(mean) if isinstance(count, Tensor) else count) / divisor(count))

        coupled = {name: (weight, share(mean)) for name, (weight, mean) in pairs.items()}
        # A side without terms is zeros of its length.
        first = next(iter(kept[0].values()))[1]
        totals = [
            sum((weight * rows for weight, rows in terms.values()), start=first.new_zeros(length))
            for terms, length in zip(kept, lengths, strict=True)
        ]
        if self.reduction == "none":
            loss = torch.cat(totals) if is_ood is None else totals[0] + totals[1]
        else:
            loss = reduce(totals[0], counts[0]) + reduce(totals[1], counts[1])
            loss = sum((weight * mean for weight, mean in coupled.values()), start=loss)
        if not return_parts:
            return loss
        parts = {
            name: reduce(rows, count).detach()
            for terms, count in zip(kept, counts, strict=True)
            for name, (_, rows) in terms.items()
        }
        return loss, parts | {name: mean.detach() for name, (_, mean) in coupled.items()}
