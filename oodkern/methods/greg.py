"""`greg` and `gregplus`: energy hinges, and a penalty on the input gradient of the energy; scored by the energy.

`gregplus` also chooses the outliers of each step from a larger batch of candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oodkern._options import option
from oodkern.classifier import Classifier
from oodkern.losses import GRegLoss
from oodkern.methods.base import Setting, generator_of
from oodkern.methods.energy import Energy, EnergyOptions, margins_of
from oodkern.methods.objective import Batch, Loss, Objective, Rows, parted
from oodkern.ops import gradient_penalty, linear_energy, linear_joint_energy
from oodkern.ops._checks import check_choice, is_fake
from oodkern.pools import cluster_sample, kmeans
from oodkern.processes import whole
from oodkern.reference import unit, widen

LARGEST = 1e3  # an energy that no image has


@dataclass
class GRegOptions(EnergyOptions):
    """Of the energy hinges, and of the gradient's norm."""

    beta: float = option(1.0, "weight of the gradient's norm")
    gradient_scale: str = option("code", "code: the norms over n_in + n_out once more, as released; paper: not")
    second_order: str = option("exact", "exact; finite_difference: first-order kernels alone, for smooth networks")
    step: float = option(0.01, "of finite differences, relative to an image's norm")
    chunk: int = option(32, "images whose gradient is formed at a time")


@dataclass
class GRegPlusOptions(GRegOptions):
    """Of the energy hinges, of the gradient's norm, and of the choice of outliers."""

    candidates: int = option(0, "outliers to choose from; 0: three times those of a step")
    clusters: int = option(0, "of the candidates' features; 0: half a step's outliers, at most 64 or its ID images")
    two_way: bool = option(True, "of each cluster the outliers of lowest and of highest energy; false: of lowest alone")
    sample_every: int = option(1, "steps that share a batch of candidates, with the features it had at the first")


class GReg(Energy):
    name = "greg"
    Options = GRegOptions
    parallel_head = False

    def __init__(self, options: Any, multi_label: bool = False) -> None:
        super().__init__(options, multi_label)
        check_choice(options.second_order, "loss.second_order", ("exact", "finite_difference"))
        if options.chunk < 1 or not 0 < options.step < math.inf:
            raise ValueError(f"loss.chunk, loss.step: expected positive, got {options.chunk} and {options.step}")

    def check(self, setting: Setting) -> None:
        """Whether the network is as smooth as finite differences expect."""
        if self.options.second_order == "exact":
            return
        device = next(setting.model.parameters()).device
        images = setting.model.normalize(setting.split.train.images(torch.arange(1)).to(device))
        try:
            gradient_penalty(Energies(setting.model.model, self), images, images.new_ones(1), "finite_difference")
        except RuntimeError:
            raise ValueError(
                "loss.second_order: finite_difference expects a smooth network, of SiLU or GELU, and the model has "
                "kinks such as ReLU's or max-pooling's; take exact"
            ) from None

    def build_loss(self, decided: Mapping[str, Any], setting: Setting | None = None) -> nn.Module:
        options = self.options
        margin_in, margin_out = margins_of(options, decided)
        return GRegLoss(
            options.alpha,
            options.beta,
            margin_in=margin_in,
            margin_out=margin_out,
            gradient_scale=options.gradient_scale,
            temperature=options.temperature,
            multi_label=self.multi_label,
        )

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        return GRegObjective(self.build_loss(decided, setting), self)

    def sketch(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        """With margins by which every sample's gradient is formed, which the loss itself would refuse."""
        objective = self.objective({**decided, "margin_in": -LARGEST, "margin_out": LARGEST}, setting)
        loss: Any = objective.loss
        loss.margin_in, loss.margin_out = LARGEST, -LARGEST
        return objective


class GRegObjective(Objective):
    """The loss of a step with its penalty, of the samples that are detected correctly."""

    def __init__(self, loss: nn.Module, method: GReg) -> None:
        super().__init__(loss)
        self.method = method

    def loss_of(self, model: Any, rows: Rows, batch: Batch) -> Loss:
        assert batch.images is not None
        n_id = len(batch.target)
        is_ood = torch.arange(len(batch.images), device=batch.images.device) >= n_id
        with torch.no_grad():
            score = self.energies(model, rows[0])
        weight = self.loss.penalty_weight(score, is_ood, batch.counts)
        # In units of the network's own inputs, as released: normalised pixels.
        with self.inner_gradient():
            penalty = self.penalty(Energies(model.model, self.method), model.normalize(batch.images), weight)
        if self.fused:
            value, parts = self.loss_of_features(model, rows[0], batch, penalty=penalty)
        else:
            known, unknown = parted(rows[0], n_id)
            value, parts = self.loss(known, batch.target, penalty, unknown, return_parts=True, **batch.of_whole)
        for name, side, count in (("in", ~is_ood, batch.counts[0]), ("out", is_ood, batch.counts[1])):
            parts[f"selected_{name}"] = ((weight > 0) & side).sum() / max(count, 1)
        return value, parts

    def penalty(self, energies: nn.Module, images: Tensor, weight: Tensor) -> Tensor:
        options = self.method.options
        arguments = (energies, images, weight, options.second_order, options.step, options.chunk)
        if options.second_order == "exact":
            return gradient_penalty(*arguments)
        # Differences of 16-bit activations: the gradient was 12 % off in bfloat16, and is 0.01 % off in float32.
        with torch.autocast(images.device.type, enabled=False):
            return gradient_penalty(*arguments)

    def energies(self, model: Any, rows: Tensor) -> Tensor:
        """What the margins speak of, of logits or with a fused head of features."""
        if not self.fused:
            return self.method.energy(rows)
        return energies_of(self.method, rows, model.head)

    def check_epoch(self, means: Mapping[str, float]) -> None:
        if means.get("selected_in", 1.0) + means.get("selected_out", 1.0) == 0:
            raise ValueError(
                f"loss.margin_in, loss.margin_out: expected margins that some energies satisfy; none was under "
                f"{self.loss.margin_in:.3g} (ID) or over {self.loss.margin_out:.3g} (outliers), so that no sample was "
                "selected whose gradient to penalise"
            )


class Energies(nn.Module):
    """Normalised images to energies (multi-label: -J), a module so that BatchNorm is found in it."""

    def __init__(self, model: nn.Module, method: GReg) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.energy(self.model(images))


def energies_of(method: GReg, features: Tensor, head: nn.Linear) -> Tensor:
    """Of features, without their logits."""
    weight, bias = (None if one is None else whole(one).to(features.dtype) for one in (head.weight, head.bias))
    if method.multi_label:
        return -linear_joint_energy(features, weight, bias)
    return linear_energy(features, weight, bias, method.options.temperature)


class GRegPlus(GReg):
    name = "gregplus"
    Options = GRegPlusOptions

    def __init__(self, options: GRegPlusOptions, multi_label: bool = False) -> None:
        super().__init__(options, multi_label)
        for key in ("candidates", "clusters"):
            if getattr(options, key) < 0:
                raise ValueError(f"loss.{key}: expected 0 or more, got {getattr(options, key)}")
        if options.sample_every < 1:
            raise ValueError(f"loss.sample_every: expected 1 or more, got {options.sample_every}")

    def sizes(self, batch_size: int, outlier_batch_size: int) -> tuple[int, int]:
        """How many candidates are read at a time, and their clusters."""
        options, taken = self.options, outlier_batch_size * self.options.sample_every
        sides = 2 if options.two_way else 1
        clusters = options.clusters or max(min(64, batch_size, outlier_batch_size // sides), 1)
        return options.candidates or 3 * taken, clusters

    def check_batches(self, batch_size: int, outlier_batch_size: int) -> None:
        candidates, clusters = self.sizes(batch_size, outlier_batch_size)
        taken = outlier_batch_size * self.options.sample_every
        if candidates < taken:
            raise ValueError(
                f"loss.candidates: expected {taken} or more, the outliers of {self.options.sample_every} step(s), got "
                f"{candidates}"
            )
        if clusters > candidates:
            raise ValueError(f"loss.clusters: expected at most {candidates}, the candidates, got {clusters}")
        if self.options.two_way and outlier_batch_size > 1 and 2 * clusters > outlier_batch_size:
            raise ValueError(
                f"loss.clusters: expected at most {outlier_batch_size // 2}, half of a step's outliers, so that those "
                f"of highest energy have a place, got {clusters}"
            )

    def objective(self, decided: Mapping[str, Any], setting: Setting) -> Objective:
        return GRegPlusObjective(self.build_loss(decided, setting), self, setting)


class GRegPlusObjective(GRegObjective):
    """Chooses of each cluster of the candidates the outliers of lowest and of highest energy, and fills at random.

    Features and clusters are those of the step that read the candidates; energies are the current head's on these
    features. What a step took, the next ones of the round pass over.
    """

    def __init__(self, loss: nn.Module, method: GRegPlus, setting: Setting) -> None:
        super().__init__(loss, method)
        options, self.count, self.seed = method.options, setting.outlier_batch_size, setting.seed
        self.every, self.two_way = options.sample_every, options.two_way
        self.candidates, self.clusters = method.sizes(setting.batch_size, self.count)
        self.features: Tensor | None = None
        self.cluster: Tensor | None = None
        self.available: Tensor | None = None

    @torch.no_grad()
    def choose(self, model: Classifier, outliers: Tensor, step: int) -> Tensor:
        random, processes = generator_of(self.seed, step, outliers.device), self.processes
        if step % self.every == 0 or self.features is None:
            model.eval()
            # In the memory of a step, and in as many parts on every process.
            count = math.ceil(math.ceil(self.candidates / processes.count) / self.count)
            parts = [self.features_of(model, part) for part in outliers.tensor_split(count)]
            self.features = processes.gather(widen(torch.cat(parts)))
            if is_fake(self.features):  # of which there is nothing to choose by
                return processes.take(outliers, torch.arange(self.count, device=outliers.device), self.candidates)
            self.cluster = kmeans(unit(self.features), self.clusters, random).index
            self.available = torch.ones(len(self.features), dtype=torch.bool, device=outliers.device)
        assert self.available is not None
        chosen = cluster_sample(
            self.features,
            energies_of(self.method, self.features, model.head),
            self.count,
            self.clusters,
            random,
            two_way=self.two_way,
            clustering=self.cluster,
            available=self.available,
        )
        # Sums on a GPU may differ in their last bit from process to process, and so what is chosen by them.
        chosen = processes.of_first(chosen)
        self.available[chosen] = False
        return processes.take(outliers, chosen, self.candidates)

    def state_dict(self) -> dict[str, Any]:
        kept = {"features": self.features, "cluster": self.cluster, "available": self.available}
        return {**super().state_dict(), "round": kept if self.every > 1 else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if (kept := state["round"]) is not None:
            self.features, self.cluster, self.available = kept["features"], kept["cluster"], kept["available"]
