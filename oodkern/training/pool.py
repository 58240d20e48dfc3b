"""The outliers that a method's stage trains with, where they are chosen among cached features of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, TrainConfig
from oodkern.data import Batches, OODSplit, augmentation
from oodkern.ops import linear_energy, linear_joint_energy
from oodkern.pools.policies import Policy
from oodkern.pools.ranks import quantile_rank
from oodkern.processes import ALONE, Processes, whole
from oodkern.schema import policy_of
from oodkern.training.evaluation import evenly_spaced
from oodkern.training.features import PoolFeatures, features_of

if TYPE_CHECKING:
    from oodkern.training.stage import Stage

SAMPLE = 4096  # rows whose energies the log has the mean of
STREAM = 1 << 32  # the number of the first choice's stream: those of the stages are below
PREPARE, SELECT = 0, 1  # purposes of random numbers
COUNTED = ("number", "begin", "extraction", "seconds")
Head = tuple[Tensor, Tensor | None]


class OutlierPool:
    """What a policy chose last of the cached features of a split's training outliers, and the stream of that.

    Features stay as they are until they are made anew, by the model as it is then; scores are the current head's.

        choice n:        policy.select(store, head, count, random(seed, n)) before its first step, b
        batch of step s: number (s - b) // every of the stream `STREAM + n` over the chosen images

    So a batch is a function of the seed, n, b and s, and of the chosen rows, which the state holds. All processes
    choose the same, and each reads its share of a batch.

    Raises ConfigError, naming the key, for features that cannot be opened, are not of these images or do not go with
    the model, and for more images than have features.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: OODSplit,
        model: Classifier,
        processes: Processes = ALONE,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.options, self.split = config, config.outliers, split
        self.processes, self.log = processes, log
        self.policy: Policy = policy_of(self.options, split.multi_label)
        self.features = PoolFeatures(config, split, model, processes, log)
        rows = len(self.features.candidates)
        if not (most := self.most_of(rows)):
            raise ConfigError(
                f"outliers.{'low' if self.options.policy == 'energy-window' else 'quantile'}: expected a part of the "
                f"pool to choose from, got none of {rows} outliers with features"
            )
        if most < self.options.count:
            raise ConfigError(
                f"outliers.count: expected at most {most} of {rows} outliers with features, those that "
                f"{self.options.policy} chooses from, got {self.options.count}"
            )
        if hasattr(self.policy, "clusters") and self.options.clusters > rows:
            raise ConfigError(
                f"outliers.clusters: expected at most {rows}, the outliers with features, got {self.options.clusters}"
            )
        self.number, self.begin = -1, 0  # of the last choice, and its first step
        self.extraction, self.seconds = 0, 0.0
        self.rows = torch.zeros(0, dtype=torch.int64)
        self.batches: Batches | None = None
        # Of the last extraction: the head, and what a policy is told of ID images.
        self.head: Head | None = None
        self.known: Tensor | None = None

    def most_of(self, rows: int) -> int:
        """How many of so many rows the policy can choose."""
        options = self.options
        if options.policy == "energy-window":
            return quantile_rank(options.high, rows, up=True) - quantile_rank(options.low, rows)
        return rows - quantile_rank(options.quantile, rows) if options.policy == "ntom" else rows

    def join(self, steps_per_epoch: int, size: int, every: int) -> None:
        """Of the stage: steps an epoch, and outliers that are read at every so many steps."""
        self.steps_per_epoch, self.size, self.every = steps_per_epoch, size, every
        self.period = steps_per_epoch if self.options.refresh == "epoch" else int(self.options.refresh)
        self.count = self.options.count or -(-self.period // every) * size

    def due(self, step: int) -> bool:
        """Whether images are chosen anew before a step. Within a round of steps that share candidates: after it."""
        if self.number < 0:
            return True
        anew = step // self.period != self.begin // self.period or self.features.due(step // self.steps_per_epoch)
        return anew and step % self.every == 0

    def batches_at(self, stage: Stage) -> Batches:
        """The stream of the stage's next step: another one where images were chosen anew."""
        if self.due(stage.step):
            started = time.perf_counter()
            try:
                self._choose(stage)
            except ValueError as error:
                raise ConfigError(f"outliers.{error}") from None
            self.seconds += time.perf_counter() - started
        assert self.batches is not None
        return self.batches

    @torch.no_grad()
    def _choose(self, stage: Stage) -> None:
        head, epoch = head_of(stage.replica.model), stage.step // self.steps_per_epoch
        if (first := self.number < 0) or self.features.due(epoch):
            stage.replica.export()
            if first:
                self.features.begin(stage.model)
            else:
                self.features.extract(stage.model, epoch)
                self.extraction += 1
            self.head = head
            if self.options.policy == "poem":
                self.known = self.processes.of_first(features_of(stage.model, self.split)).cpu()
            self._prepare()
        store = self.features.store
        count = min(self.count, self.most_of(len(store)))
        if first:
            self.log(
                f"pool: {self.options.policy} chooses {count:,} of {len(store):,} outliers every {self.period:,} steps"
                + (", which are all" if count == len(store) else "")
            )
        self.number, self.begin = self.number + 1, stage.step
        random = random_numbers(self.config.seed, SELECT, self.number)
        chosen = self.policy.select(store, head, count, random)
        # Sums on a GPU may differ in their last bit from process to process, and so what is chosen by them.
        self.rows = self.processes.of_first(chosen.to(stage.device)).cpu()
        self._stream()

    def _prepare(self) -> None:
        assert self.head is not None
        random = random_numbers(self.config.seed, PREPARE, self.extraction)
        own = {} if self.known is None else {"known": self.known}
        policy = policy_of(self.options, self.split.multi_label, **own, processes=self.processes)
        self.policy = policy.prepare(self.features.store, self.head, random)

    def _stream(self) -> None:
        images = self.split.outliers.select(self.features.images[self.rows])
        augment = augmentation(self.split.outlier_augmentation)
        self.batches = Batches(images, self.size, self.config.seed, STREAM + self.number, augment, self.processes)

    def batch_number(self, step: int) -> int:
        """Of the stream of the last choice."""
        return (step - self.begin) // self.every

    def means(self, stage: Stage) -> dict[str, float]:
        """Mean energies by the current head of what was chosen last and of the pool, and seconds spent since the last
        call.

        Of SAMPLE rows at most, evenly spaced. Of multi-label classifiers it is minus the joint energy.
        """
        head, found, self.seconds = head_of(stage.replica.model), {"pool_seconds": self.seconds}, 0.0
        everything = torch.arange(len(self.features.store))
        for name, rows in (("pool_chosen_energy", self.rows), ("pool_energy", everything)):
            some = self.features.store.rows(rows[evenly_spaced(len(rows), SAMPLE)]).to(head[0])
            energy = -linear_joint_energy(some, *head) if self.split.multi_label else linear_energy(some, *head)
            found[name] = float(energy.double().mean())
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice and the next batch depend on, but for the features themselves."""
        return {
            **{name: getattr(self, name) for name in COUNTED},
            "rows": self.rows,
            "head": self.head,
            "known": self.known,
            "features": self.features.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Raises ConfigError where the features that the state goes on with are gone, or others."""
        self.features.load_state_dict(state["features"])
        for name in COUNTED:
            setattr(self, name, state[name])
        self.rows, self.known = state["rows"], state["known"]
        if self.number >= 0:
            weight, bias = state["head"]
            self.head = weight.to(device), None if bias is None else bias.to(device)
            self._prepare()
            self._stream()


def random_numbers(seed: int, purpose: int, number: int) -> torch.Generator:
    """Of one choice or extraction. Mixed first: on the CPU PyTorch takes the lowest 32 bits of a seed."""
    mixed = np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def head_of(model: Any) -> Head:
    """The weight [K, D] and bias [K] of a model's head, as they are now; every process has to ask."""
    head = model.head
    return whole(head.weight.detach()).clone(), None if head.bias is None else whole(head.bias.detach()).clone()
