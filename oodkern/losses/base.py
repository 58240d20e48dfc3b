"""What all losses share: the two calling styles, the reductions, the classification term."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oodkern.ops import energy, joint_energy
from oodkern.ops._checks import check_logits, check_tensor

REDUCTIONS = ("mean", "sum", "batchmean", "none")

# A term of a loss: its weight and its value for each row.
Terms = Mapping[str, tuple[float, Tensor]]


def check_non_negative(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")
    return float(value)


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def cross_entropy(logits: Tensor, target: Tensor, energy_at_1: Tensor) -> Tensor:
    """logsumexp(z) - z_y of each row, [N]; rows with target < 0 get a number that means nothing.

    The difference of two numbers as large as the logits: its absolute error is theirs, about |E| float32 units in
    the last place (4e-6 for logits of 30), where torch's cross_entropy subtracts the maximum first (3e-7) and keeps
    a copy of the logits to do so.
    """
    if logits.shape[-1] == 0:
        return energy_at_1
    picked = logits.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -energy_at_1 - picked.to(energy_at_1.dtype)


def binary_cross_entropy(logits: Tensor, target: Tensor, joint: Tensor) -> Tensor:
    """mean over labels of softplus(z_c) - y_c z_c, each row, [N]: one JointEnergy and one product."""
    labels = max(logits.shape[-1], 1)
    chosen = (logits * target.to(logits.dtype)).sum(-1, dtype=joint.dtype)
    return (joint - chosen) / labels


class OutlierLoss(nn.Module):
    """A loss of in-distribution rows and a loss of outlier rows, in two calling styles.

    Split: `loss(logits_id, target_id, logits_ood)`. Mixed: `loss(logits, target)`, where a row is an outlier if
    its target is negative; in multi-label tasks if its targets are all negative, or where `is_ood` is true.

    Reductions, with the rows' losses weighted by the loss's own weights:
        mean: mean over the ID part + mean over the OOD part (an empty part counts 0 and keeps the graph)
        sum: sum over all rows
        batchmean: the sum divided by the number of all rows
        none: one number a row, in the order of the rows (split: ID first)
    """

    def __init__(self, reduction: str, multi_label: bool) -> None:
        super().__init__()
        self.reduction = check_choice(reduction, "reduction", REDUCTIONS)
        self.multi_label = bool(multi_label)

    @property
    def separable(self) -> bool:
        """Whether loss(id, y, ood) = loss(id, y, nothing) + loss(nothing, nothing, ood).

        The two can then be formed and differentiated one after the other.
        """
        return self.reduction in ("mean", "sum")

    def score(self, logits: Tensor) -> Tensor:
        """What both kinds of rows need of the logits, [N]: formed once a row."""
        return joint_energy(logits) if self.multi_label else energy(logits)

    def id_terms(self, logits: Tensor, target: Tensor, score: Tensor, skip: Tensor | None = None) -> Terms:
        """The terms of in-distribution rows.

        In a mixed batch `skip` marks the rows of outliers, whose numbers are left out afterwards; a term whose slope
        is not finite where the numbers are infinite has to leave them out itself.
        """
        raise NotImplementedError

    def ood_terms(self, logits: Tensor, score: Tensor, skip: Tensor | None = None) -> Terms:
        """The terms of outlier rows; `skip` marks the in-distribution ones."""
        raise NotImplementedError

    def classification(self, logits: Tensor, target: Tensor, score: Tensor) -> Tensor:
        form = binary_cross_entropy if self.multi_label else cross_entropy
        return form(logits, target, score)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        logits_ood: Tensor | None = None,
        *,
        is_ood: Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss.

        Args:
            logits: [N, K] of the in-distribution rows, or of all rows in the mixed style.
            target: [N] integers in 0..K-1, negative for outliers (mixed style); multi-label [N, K] of 0 and 1.
            logits_ood: [M, K] of the outliers, which makes the style split.
            is_ood: [N] bool, mixed multi-label style: which rows are outliers.
            return_parts: also return each term before its weight, reduced as the loss is, detached.

        Returns:
            A scalar ([N + M] or [N] with reduction "none"), float32 (float64 for float64 logits); with
            `return_parts` a tuple of it and a dict. A term that no row has is 0.
        """
        self._check(logits, target, logits_ood, is_ood)
        score = self.score(logits)
        if logits_ood is not None:
            outlier_terms = self.ood_terms(logits_ood, self.score(logits_ood))
            counts = len(logits), len(logits_ood)
            return self._reduce(self.id_terms(logits, target, score), outlier_terms, counts, None, return_parts)
        if is_ood is None:
            is_ood = (target < 0).all(-1) if self.multi_label else target < 0
        if self.multi_label:
            target = target.clamp_min(0)
        terms = self.id_terms(logits, target, score, is_ood), self.ood_terms(logits, score, ~is_ood)
        return self._reduce(*terms, ((~is_ood).sum(), is_ood.sum()), is_ood, return_parts)

    def _reduce(
        self,
        id_terms: Terms,
        ood_terms: Terms,
        counts: tuple[Any, Any],
        is_ood: Tensor | None,
        return_parts: bool,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        def keep(rows: Tensor, outliers: bool) -> Tensor:
            if is_ood is None:
                return rows
            return torch.where(is_ood if outliers else ~is_ood, rows, 0.0)

        def reduce(rows: Tensor, count: int | Tensor) -> Tensor:
            if self.reduction == "none":
                return rows
            if self.reduction == "sum":
                return rows.sum()
            if self.reduction == "batchmean":
                count = counts[0] + counts[1]
            return rows.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))

        kept = [
            {name: (weight, keep(rows, outliers)) for name, (weight, rows) in terms.items()}
            for terms, outliers in ((id_terms, False), (ood_terms, True))
        ]
        # A side without terms is zeros of its length.
        first = next(iter(kept[0].values()))[1]
        lengths = counts if is_ood is None else (len(first), len(first))
        totals = [
            sum((weight * rows for weight, rows in terms.values()), start=first.new_zeros(length))
            for terms, length in zip(kept, lengths, strict=True)
        ]
        if self.reduction == "none":
            loss = torch.cat(totals) if is_ood is None else totals[0] + totals[1]
        else:
            loss = reduce(totals[0], counts[0]) + reduce(totals[1], counts[1])
        if not return_parts:
            return loss
        parts = {
            name: reduce(rows, count).detach()
            for terms, count in zip(kept, counts, strict=True)
            for name, (_, rows) in terms.items()
        }
        return loss, parts

    def _check(self, logits: Tensor, target: Tensor, logits_ood: Tensor | None, is_ood: Tensor | None) -> None:
        for tensor, name in ((logits, "logits"), (logits_ood, "logits_ood")):
            if tensor is not None:
                check_logits(tensor, name)
                if tensor.dim() != 2:
                    raise ValueError(f"{name}: expected [N, K], got {list(tensor.shape)}")
        check_tensor(target, "target")
        N, K = logits.shape
        if logits_ood is not None and logits_ood.shape[1] != K:
            raise ValueError(f"logits_ood: expected {K} classes as logits have, got {logits_ood.shape[1]}")
        expected = (N, K) if self.multi_label else (N,)
        if tuple(target.shape) != expected:
            hint = "" if self.multi_label or target.dim() != 2 else " (multi-label targets need multi_label=True)"
            raise ValueError(f"target: expected {list(expected)}, got {list(target.shape)}{hint}")
        if is_ood is not None:
            check_tensor(is_ood, "is_ood")
            if logits_ood is not None or not self.multi_label:
                raise ValueError("is_ood: goes with the mixed style of multi-label losses; use target < 0 otherwise")
            if is_ood.dtype != torch.bool or tuple(is_ood.shape) != (N,):
                raise ValueError(f"is_ood: expected bool [{N}], got {is_ood.dtype} {list(is_ood.shape)}")
        for tensor, name in ((target, "target"), (logits_ood, "logits_ood"), (is_ood, "is_ood")):
            if tensor is not None and tensor.device != logits.device:
                raise ValueError(f"{name}: expected on {logits.device}, where logits are, got {tensor.device}")
        integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if not self.multi_label and target.dtype not in integers:
            raise TypeError(f"target: expected integers, got {target.dtype}")
        # Reading the targets would make a GPU wait and torch.compile break its graph; there, gather's own check serves.
        if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
            self._check_values(target, K, mixed=logits_ood is None, marked=is_ood is not None)

    def _check_values(self, target: Tensor, K: int, mixed: bool, marked: bool) -> None:
        low, high = target.min().item(), target.max().item()
        if not self.multi_label:
            if high >= K or (low < 0 and not mixed):
                raise ValueError(f"target: expected classes in 0..{K - 1}, got {high if high >= K else low}")
        elif low < 0 or high > 1 or not ((target == 0) | (target == 1)).all():
            # Negative rows mark outliers in a mixed batch, whole rows only.
            negative = target < 0
            whole = negative.all(-1) | ~negative.any(-1)
            if not (mixed and not marked and whole.all() and ((target == 0) | (target == 1) | negative).all()):
                rule = "0 or 1, or a whole row of -1 for an outlier" if mixed and not marked else "0 or 1"
                raise ValueError(f"target: expected {rule}, got values from {low} to {high}")
