"""OAL: a teacher's logits and features, distilled, and a contrast of the student's features with synthetic outliers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oodkern import reference
from oodkern._precision import unrounded
from oodkern.losses._checks import check_logit_rows, check_target
from oodkern.losses._oal_networks import Conditional, Identity, Transfer, common
from oodkern.losses.base import Loss, cross_entropy
from oodkern.losses.logits import GivenLogits
from oodkern.ops import club, distillation, info_nce
from oodkern.ops._checks import check_choice, check_count, check_non_negative, check_temperature
from oodkern.ops._product import check_beside, check_matrix

CONTRASTS, CLUB_MODES, TRANSFERS = ("club", "infonce"), ("literal", "mle"), ("mlp", "identity")
# As released, relative to the student's 0.005: 0.01 of the transfer, 1e-4 of CLUB's nets. At that rate maximum
# likelihood takes q from 75.5 to 70.5 nats in ten epochs of the embedded digits, at the student's own to 51.8.
TRANSFER_RATE, CLUB_RATE, LIKELIHOOD_RATE = 2.0, 0.02, 1.0


class OALLoss(nn.Module):
    """CE + weight_logits KL(t || s) + weight_features KL(softmax(transfer(u)) || softmax(h)) + contrast, means of rows.

    h [N, D] and s = softmax of the student's features and logits, u and t the frozen teacher's on the same images. No
    term sees logits of outliers: these are rows of banks of synthetic ones (`oodkern.synthesis`), drawn for each batch.

    contrast "club": sum over banks of weight_mi * CLUB(x, h), `oodkern.club` with q(h | x) = N(mean(x),
    exp(log_variance(x))) of outliers x, row i of the bank beside the i-th ID row. q is two networks a bank, as released
    for D = 512: mean d - 256 - 512, log-variance d - 256 - 512 - tanh, with D // 2 in place of 256; the mean of a
    second bank is d - d/2 - d/4 - 256 - 512. What their parameters get is told by `club_mode`:
        literal: as released, they descend the same term. q is then fitted to nothing, the term is no bound of mutual
            information, and has no lower bound either.
        mle: the gradient of the negative log-likelihood of the (detached) features, mean over rows, weight 1, alone;
            and the term's own gradient reaches h alone. The loss's value does not hold the likelihood, so that both
            modes report the same loss; its gradient does.
    Either way outliers and images are paired at random, hence independent: for any fixed q the expectation of the
    term and of its gradient in h over the pairings is exactly 0. It is noise of mean zero, and what it does beyond
    that comes of the coupling of h with a q that follows it; the method's gains may well be the teacher's. Compare
    with weight_mi=(0, 0), and with the other contrast.

    contrast "infonce", an alternative in which outliers are negatives: weight_mi[0] * `oodkern.info_nce` of queries h,
    keys the K prototypes of the classes and the outliers of the first bank, which are of the teacher's feature space,
    through `transfer` with running statistics and without gradient; the positive key is the row's class. In training
    mode a call first moves the prototype of each class of the batch towards the mean feature's direction,
    p = momentum p + (1 - momentum) mean / ||mean||, without gradient; a class that was never seen has prototype 0.
    Of several processes each moves those that it holds, by the rows that it is given.

    Args:
        features: D, the size of the student's features.
        classes: K.
        teacher_features: the size of the teacher's features.
        latents: sizes of the outliers of the banks, one or two of them.
        weight_logits, weight_features: of the two distillations, as released.
        weight_mi: of the contrast, one number a bank; a single bank has the first.
        temperature: T > 0 of the distillation of logits, T^2 KL (1 as released). That of features is at 1.
        contrast: "club" or "infonce".
        club_mode: "literal" or "mle".
        contrast_temperature: T > 0 of InfoNCE.
        momentum: of the prototypes, at least 0 and below 1.
        transfer: "mlp", BN - Linear - ReLU - BN, trained with the student as released: the gradient of the second
            distillation reaches both its sides. "identity" for a teacher of D features too, of its own architecture.

    Parts: `ce`, `distillation`, `feature_distillation`, then `club_1`, `club_2` (with "mle" also `likelihood_1`,
    `likelihood_2`: the negative log-likelihoods, in nats) or `info_nce`; each before its weight. Parameters stay
    float32 (or float64) whatever the inputs are.

    Source: Gao, Li, OAL, ICMR 2025 (arXiv 2406.16525), and its released code; CLUB: Cheng et al., ICML 2020.
    """

    prototypes: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        teacher_features: int,
        latents: Sequence[int],
        weight_logits: float = 4.0,
        weight_features: float = 8.0,
        weight_mi: float | Sequence[float] = (0.1, 0.2),
        temperature: float = 1.0,
        contrast: str = "club",
        club_mode: str = "literal",
        contrast_temperature: float = 0.1,
        momentum: float = 0.9,
        transfer: str = "mlp",
    ) -> None:
        super().__init__()
        for size, name in ((features, "features"), (classes, "classes"), (teacher_features, "teacher_features")):
            check_count(size, name, 1)
        if not isinstance(latents, tuple | list):
            raise TypeError(f"latents: expected one or two sizes, a sequence, got {type(latents).__name__}")
        if not 1 <= len(latents) <= 2:
            raise ValueError(f"latents: expected one or two sizes, one a bank, got {len(latents)}")
        for i, size in enumerate(latents):
            check_count(size, f"latents[{i}]", 1)
        self.features, self.classes, self.teacher_features = features, classes, teacher_features
        self.latents = tuple(latents)
        self.weight_logits = check_non_negative(weight_logits, "weight_logits")
        self.weight_features = check_non_negative(weight_features, "weight_features")
        weights = tuple(weight_mi) if isinstance(weight_mi, tuple | list) else (weight_mi,)
        if len(weights) < len(latents):
            raise ValueError(f"weight_mi: expected {len(latents)} numbers, one a bank, got {len(weights)}")
        self.weight_mi = tuple(check_non_negative(weight, f"weight_mi[{i}]") for i, weight in enumerate(weights))
        self.temperature = check_temperature(temperature)
        self.contrast = check_choice(contrast, "contrast", CONTRASTS)
        self.club_mode = check_choice(club_mode, "club_mode", CLUB_MODES)
        self.contrast_temperature = check_temperature(contrast_temperature, "contrast_temperature")
        self.momentum = check_non_negative(momentum, "momentum")
        if self.momentum >= 1:
            raise ValueError(f"momentum: expected a number below 1, got {momentum}")
        self.transfer_kind = check_choice(transfer, "transfer", TRANSFERS)
        if transfer == "identity" and features != teacher_features:
            raise ValueError(
                f"transfer: 'identity' is for a teacher of the student's architecture; got features={features} and "
                f"teacher_features={teacher_features}"
            )
        if contrast == "infonce" and latents[0] != teacher_features:
            raise ValueError(
                f"latents[0]: expected {teacher_features} as teacher_features, since contrast='infonce' maps the first "
                f"bank by the transfer, got {latents[0]}"
            )
        self.transfer = Identity() if transfer == "identity" else Transfer(teacher_features, features)
        sizes = self.latents if contrast == "club" else ()
        self.conditionals = nn.ModuleList(Conditional(size, features, i > 0) for i, size in enumerate(sizes))
        self.register_buffer("prototypes", torch.zeros(classes, features) if contrast == "infonce" else None)

    def forward(
        self,
        features: Tensor,
        logits: Tensor,
        target: Tensor,
        outlier_latents: Tensor | Sequence[Tensor],
        teacher_logits: Tensor,
        teacher_features: Tensor,
        *,
        return_parts: bool = False,
    ) -> Loss:
        """The loss.

        Args:
            features: [N, D] of the student, float64, float32, bfloat16 or float16.
            logits: [N, K] of the student.
            target: [N] integers in 0..K-1. Rows with target < 0, outliers of a mixed batch, count nothing, whatever
                they hold: they are left out of every term (on a GPU their number is waited for).
            outlier_latents: [M, d], a tensor a bank, drawn at random. For CLUB at least as many as there are ID rows,
                of which the first are taken; for InfoNCE any number.
            teacher_logits: [N, K], and
            teacher_features: [N, teacher's size], of the teacher in evaluation mode, on the same images. None of
                these, nor the outliers, may require a gradient, which they would not get.
            return_parts: also return each term before its weight, detached.

        Returns:
            A scalar, float32 (float64 where an input or the parameters are), also under autocast, where nothing is
            rounded; with `return_parts` a tuple of it and a dict. 0 with gradients of 0 where there is no ID row; with
            one alone `transfer` takes its running statistics. Differentiable once, in features, logits and the
            parameters. Raises TypeError or ValueError for an argument of the wrong kind or shape.
        """
        banks = self._check(features, logits, target, outlier_latents, teacher_logits, teacher_features)
        arguments = (features, logits, target, banks, teacher_logits, teacher_features)
        terms, silent = unrounded(self._terms)(*arguments)
        loss = torch.stack(common(*(weight * value for weight, value in terms.values()))).sum()
        for value in silent.values():
            loss = loss + (value - value.detach())
        if not return_parts:
            return loss
        parts = {name: value.detach() for name, (_, value) in terms.items()}
        return loss, parts | {name: value.detach() for name, value in silent.items()}

    def _terms(
        self,
        features: Tensor,
        logits: Tensor,
        target: Tensor,
        banks: Sequence[Tensor],
        teacher_logits: Tensor,
        teacher_features: Tensor,
    ) -> tuple[dict[str, tuple[float, Tensor]], dict[str, Tensor]]:
        """The terms with their weights, and those whose gradient alone counts."""
        rows = (target >= 0).nonzero().squeeze(1)
        n = len(rows)
        for i, bank in enumerate(banks):
            if self.contrast == "club" and len(bank) < n:
                raise ValueError(f"outlier_latents[{i}]: expected {n} rows or more, one an ID row, got {len(bank)}")
        h, u, y = reference.widen(features[rows]), teacher_features[rows], target[rows].long()
        z, t = logits[rows], teacher_logits[rows]
        if (z.dtype == torch.float64) != (t.dtype == torch.float64):
            z, t = common(z, t)

        def mean(values: Tensor) -> Tensor:
            return values.sum() / max(n, 1)

        # Both sides have a gradient: the plain formula, which keeps the [N, D] that it forms.
        h_of_teacher, h_of_student = common(self.transfer(u), h)
        terms = {
            "ce": (1.0, mean(cross_entropy(GivenLogits(z, y)))),
            "distillation": (self.weight_logits, mean(distillation(z, t, self.temperature))),
            "feature_distillation": (self.weight_features, mean(reference.distillation(h_of_student, h_of_teacher))),
        }
        silent: dict[str, Tensor] = {}
        if self.contrast == "infonce":
            terms["info_nce"] = (self.weight_mi[0], mean(self._info_nce(h, y, banks[0])))
            return terms, silent
        for i, (q, bank) in enumerate(zip(self.conditionals, banks, strict=True)):
            center, log_variance, known = common(*q(bank[:n]), h)
            if self.club_mode == "mle":
                squares = (known.detach() - center).square() * (-log_variance).exp()
                normal = squares + log_variance + math.log(2 * math.pi)
                silent[f"likelihood_{i + 1}"] = mean(normal / 2)
                center, log_variance = center.detach(), log_variance.detach()
            terms[f"club_{i + 1}"] = (self.weight_mi[i], club(center, log_variance, known))
        return terms, silent

    def _info_nce(self, h: Tensor, y: Tensor, bank: Tensor) -> Tensor:
        if self.training:
            self._move_prototypes(h.detach(), y)
        with torch.no_grad():
            outliers = self.transfer(bank, running=True)
            keys = torch.cat(common(self.prototypes, outliers))
        queries, keys = common(h, keys)
        return info_nce(queries, keys, y, self.contrast_temperature)

    @torch.no_grad()
    def _move_prototypes(self, h: Tensor, y: Tensor) -> None:
        """A one-hot product, not an index_add, whose order of additions differs from run to run on a GPU."""
        own = torch.zeros(len(y), self.classes, dtype=h.dtype, device=h.device).scatter_(1, y[:, None], 1.0)
        # The direction of the sum is that of the mean.
        direction = reference.unit(own.T @ h).to(self.prototypes.dtype)
        moved = self.momentum * self.prototypes + (1 - self.momentum) * direction
        self.prototypes.copy_(torch.where(own.any(0)[:, None], moved, self.prototypes))

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """(parameters, their learning rate relative to the student's): the transfer, as released, then CLUB's q."""
        club = CLUB_RATE if self.club_mode == "literal" else LIKELIHOOD_RATE
        groups = [(self.transfer, TRANSFER_RATE), (self.conditionals, club)]
        return [(list(part.parameters()), rate) for part, rate in groups if any(True for _ in part.parameters())]

    def _check(
        self, features: Any, logits: Any, target: Any, latents: Any, teacher_logits: Any, teacher_features: Any
    ) -> Sequence[Tensor]:
        """Of all arguments of `forward`; the outliers as a tensor a bank."""
        check_matrix(features, "features")
        N = len(features)
        check_logit_rows(logits, None)
        for value, name, of in (
            (teacher_logits, "teacher_logits", "N, K"),
            (teacher_features, "teacher_features", "N, D"),
        ):
            check_matrix(value, name, of)
        sizes = (
            (features, "features", self.features),
            (logits, "logits", self.classes),
            (teacher_logits, "teacher_logits", self.classes),
            (teacher_features, "teacher_features", self.teacher_features),
        )
        for value, name, size in sizes:
            if tuple(value.shape) != (N, size):
                raise ValueError(f"{name}: expected [{N}, {size}], got {list(value.shape)}")
            check_beside(value, name, features, "features", dtype=False)
        check_target(target, None, (N, self.classes), False, False, logits, "logits")
        banks = [latents] if isinstance(latents, Tensor) else latents
        if not isinstance(banks, tuple | list):
            raise TypeError(f"outlier_latents: expected a tensor a bank, got {type(latents).__name__}")
        if len(banks) != len(self.latents):
            raise ValueError(f"outlier_latents: expected {len(self.latents)} tensors, one a bank, got {len(banks)}")
        for i, (bank, size) in enumerate(zip(banks, self.latents, strict=True)):
            name = f"outlier_latents[{i}]"
            check_matrix(bank, name, "M, d")
            if bank.shape[1] != size:
                raise ValueError(f"{name}: expected [M, {size}], got {list(bank.shape)}")
            check_beside(bank, name, features, "features", dtype=False)
        frozen = [(teacher_logits, "teacher_logits"), (teacher_features, "teacher_features")]
        frozen += [(bank, f"outlier_latents[{i}]") for i, bank in enumerate(banks)]
        for value, name in frozen:
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}: expected a tensor that requires no gradient, since it gets none; detach it")
        for kept in itertools.chain(self.parameters(), self.buffers()):
            if kept.dtype in (torch.float16, torch.bfloat16):
                name = str(kept.dtype).removeprefix("torch.")
                raise TypeError(f"parameters: expected float32 or float64, whatever the inputs are, got {name}")
        return banks

    def extra_repr(self) -> str:
        mode = f"club_mode={self.club_mode!r}"
        if self.contrast == "infonce":
            mode = f"contrast_temperature={self.contrast_temperature}, momentum={self.momentum}"
        return (
            f"features={self.features}, classes={self.classes}, teacher_features={self.teacher_features}, "
            f"latents={self.latents}, weight_logits={self.weight_logits}, weight_features={self.weight_features}, "
            f"weight_mi={self.weight_mi}, temperature={self.temperature}, contrast={self.contrast!r}, {mode}, "
            f"transfer={self.transfer_kind!r}"
        )
