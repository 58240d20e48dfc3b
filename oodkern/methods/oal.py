"""`oal`: a teacher distilled, and a contrast with outliers synthesised in its feature space; scored by the energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodkern._options import option
from oodkern.classifier import Classifier, Output
from oodkern.data import ImageSet
from oodkern.losses import OALLoss
from oodkern.methods.base import Method, Setting, generator_of
from oodkern.methods.objective import Batch, Loss, Objective, Rows
from oodkern.ops._checks import check_choice
from oodkern.synthesis import boundary_outliers, read_bank
from oodkern.synthesis.boundary import _share, check_draws

TRANSFERS, TEACHER_OUTPUTS = ("auto", "mlp", "identity"), ("auto", "online", "cached")
PER_CLASS = 500  # images whose features outliers are drawn around, as released
BANK = -1  # the draws of the bank, beside those of the steps


@dataclass
class OALOptions:
    """Of the distillation, of the contrast and of the synthetic outliers."""

    teacher: str = option("", "the folder of a run whose model teaches; empty: the starting model")
    teacher_outputs: str = option("auto", "cached: of the images as they are, once; online: of each batch; auto")
    weight_logits: float = option(4.0, "weight of the teacher's logits")
    weight_features: float = option(8.0, "weight of the teacher's features")
    weight_mi: list[float] = option([0.1, 0.2], "weight of the contrast, for each bank of outliers")
    temperature: float = option(1.0, "of the distillation of logits")
    transfer: str = option(
        "auto", "of the teacher's features to the student's: mlp, identity; auto: identity of the starting model"
    )
    contrast: str = option("club", "club; infonce: class prototypes against outliers")
    club_mode: str = option("literal", "literal: as released; mle: its networks fitted by maximum likelihood")
    contrast_temperature: float = option(0.1, "of infonce")
    bank: str = option("", "a .npy or .safetensors file of a second bank of outliers, such as diffusion latents")
    neighbour: float = option(0.6, "which neighbour's distance makes a boundary, as a share of the class")
    boundary: float = option(0.1, "share of the class that is its boundary")
    draws: int = option(1500, "around each image of the boundary")
    keep: int = option(2, "of the draws, those farthest from the class")
    sigma: float = option(0.07, "of the draws, on the unit sphere")
    rounds: int = option(10, "of drawing")


class OAL(Method):
    name = "oal"
    Options = OALOptions
    uses_outliers, parallel_head = False, False
    score_names = ("energy", None)

    def __init__(self, options: OALOptions, multi_label: bool = False) -> None:
        check_choice(options.transfer, "loss.transfer", TRANSFERS)
        check_choice(options.teacher_outputs, "loss.teacher_outputs", TEACHER_OUTPUTS)
        if options.bank and options.contrast == "infonce":
            raise ValueError(f"loss.bank: infonce has one bank, in the teacher's feature space; got {options.bank}")
        check_draws(options.neighbour, options.boundary, options.draws, options.keep, options.sigma, options.rounds)
        super().__init__(options, multi_label)

    @property
    def coupled(self) -> str:
        return "the contrast"

    def check(self, setting: Setting) -> None:
        options = self.options
        if options.bank and not Path(options.bank).is_file():
            raise ValueError(f"loss.bank: no such file: {options.bank}")
        if options.teacher and not Path(options.teacher).is_dir():
            raise ValueError(f"loss.teacher: expected the folder of a run, and {options.teacher} is none")
        features, classes = setting.model.head.in_features, len(setting.split.classes)
        taught = self.teacher_of(setting).head.in_features
        more = (read_bank(Path(options.bank)).shape[1],) if options.bank else ()
        self.loss_of_sizes(features, classes, taught, (taught, *more))

    def teacher_of(self, setting: Setting) -> Classifier:
        return setting.load_classifier(self.options.teacher) if self.options.teacher else setting.model

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        return self.loss_of_sizes(8, 2, 8, (8, 8) if self.options.bank else (8,))  # of any sizes, to check the options

    def loss_of_sizes(self, features: int, classes: int, teacher_features: int, latents: tuple[int, ...]) -> OALLoss:
        options = self.options
        own = not options.teacher and features == teacher_features
        return OALLoss(
            features,
            classes,
            teacher_features,
            latents,
            options.weight_logits,
            options.weight_features,
            tuple(options.weight_mi),
            options.temperature,
            options.contrast,
            options.club_mode,
            options.contrast_temperature,
            transfer=("identity" if own else "mlp") if options.transfer == "auto" else options.transfer,
        )

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        images, teacher, cached = setting.split.train, self.teacher_of(setting), self.cached(setting)
        looked_at = torch.arange(len(images)) if cached else first_of_each(images.labels, PER_CLASS)
        taught = outputs_of(teacher, images, looked_at)
        kept = first_of_each(images.labels[looked_at], PER_CLASS).to(taught.features.device)
        features, labels = taught.features[kept], images.labels[looked_at].to(kept.device)[kept]
        bank = self.synthesised(features, labels, generator_of(setting.seed, BANK))
        return self.objective_of(setting, teacher, taught if cached else None, bank)

    def sketch(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        options, images, teacher = self.options, setting.split.train, self.teacher_of(setting)
        width, device = teacher.head.in_features, teacher.head.weight.device
        taught = Output(*(torch.zeros(len(images), size, device=device) for size in (len(images.classes), width)))
        members = torch.bincount(images.labels).clamp_max(PER_CLASS).tolist()
        edges = sum(_share(options.boundary, count) for count in members if count)
        bank = torch.zeros(options.rounds * options.keep * edges, width, device=device)
        return self.objective_of(setting, teacher, taught if self.cached(setting) else None, bank)

    def cached(self, setting: Setting) -> bool:
        """Whether the teacher's outputs are formed once, of the images as they are."""
        choice = self.options.teacher_outputs
        return choice == "cached" or (choice == "auto" and setting.split.augmentation == "none")

    def objective_of(self, setting: Setting, teacher: Classifier, taught: Output | None, bank: Tensor) -> OALObjective:
        banks = [bank]
        if self.options.bank:
            banks.append(read_bank(Path(self.options.bank)).to(bank.device))
        sizes = tuple(bank.shape[1] for bank in banks)
        classes = len(setting.split.train.classes)
        loss = self.loss_of_sizes(setting.model.head.in_features, classes, teacher.head.in_features, sizes)
        return OALObjective(loss, teacher, taught, banks, setting.seed)

    def synthesised(self, features: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
        """Outliers in the teacher's feature space: at norm 1 as they are drawn, times their class's mean norm."""
        options = self.options
        shares, counts = (options.neighbour, options.boundary), (options.draws, options.keep)
        found = boundary_outliers(features, labels, random, *shares, *counts, options.sigma, options.rounds)
        norm, count = features.norm(dim=1), torch.bincount(labels).clamp_min(1)
        mean = torch.stack([norm[labels == label].sum() for label in range(len(count))]) / count
        return found.latents * mean[found.labels].unsqueeze(1)


class OALObjective(Objective):
    def __init__(
        self, loss: nn.Module, teacher: Classifier, taught: Output | None, banks: list[Tensor], seed: int
    ) -> None:
        super().__init__(loss)
        self.teacher, self.taught, self.banks, self.seed = teacher, taught, banks, seed

    def rows(self, model: Any, images: Tensor) -> Rows:
        return tuple(model.outputs(images))

    def given(self, images: Tensor) -> Rows:
        return tuple(self.teacher.outputs(images)) if self.taught is None else ()

    def loss_of(self, model: Any, rows: Rows, batch: Batch) -> Loss:
        logits, features, *of_teacher = rows
        if self.taught is not None:
            indices = batch.indices.to(logits.device)
            of_teacher = [one[indices] for one in self.taught]
        taught = Output(*of_teacher)
        random = generator_of(self.seed, batch.step)
        latents = [drawn(bank, len(logits), random) for bank in self.banks]
        return self.loss(features, logits, batch.target, latents, taught.logits, taught.features, return_parts=True)


def drawn(bank: Tensor, count: int, random: torch.Generator) -> Tensor:
    """`count` rows of a bank, each at most once where there are as many."""
    if len(bank) < count:
        return bank[torch.randint(len(bank), (count,), generator=random).to(bank.device)]
    return bank[torch.randperm(len(bank), generator=random)[:count].to(bank.device)]


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Indices of the first `count` samples of each class, in order."""
    order = labels.argsort(stable=True)
    sizes = torch.bincount(labels)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    return order[rank < count].sort().values


@torch.no_grad()
def outputs_of(model: Classifier, images: ImageSet, indices: Tensor, batch_size: int = 256) -> Output:
    """Logits and features of images as they are, on the model's device, in float32."""
    device = next(model.parameters()).device
    found = [model.outputs(images.images(batch).to(device)) for batch in indices.split(batch_size)]
    logits, features = (torch.cat(one).float() for one in zip(*found, strict=True))
    return Output(logits, features)
