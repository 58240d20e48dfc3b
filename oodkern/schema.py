"""Every key of a run's configuration, with its default and its meaning; `loss` stands for the method's own."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from oodkern._options import option
from oodkern.data.options import DataConfig, is_multi_label, path_of
from oodkern.methods import METHODS
from oodkern.models import ModelConfig
from oodkern.pools.policies import POLICIES, Policy

PRECISIONS, OPTIMIZERS, SCHEDULES = ("fp32", "bf16", "fp16"), ("sgd", "adamw"), ("cosine", "step", "constant")
HEADS = ("full", "fused")
BATCH_NORMS = ("batch", "frozen", "sync")
IMPLEMENTATIONS = ("auto", "fused", "foreach")
COMPILED = ("none", "backbone")
PARALLEL = ("ddp", "fully_shard")
AUTO = "auto"  # a pool that the run makes itself; the score that suits the labels

# Defaults of an embedded set, and of a method on it, where they are not those of the schema: found by hand, on splits
# other than those that the README reports, but for energy's alpha, where 0.0001 was tried on these before 0.0003.
# Binary cross-entropy is a mean over the labels, and SGD at the rates of the other set does not fit it; plain training
# goes on to gain mAP for 40 epochs, which would count as the methods' loss. With BatchNorm on batch statistics, in
# which varied outliers outweigh the ID images, fine-tuning loses 2 to 6 points of mAP whatever the weight of the
# outliers; with the starting model's, 0 to 3. Adam follows the outliers' term even at small weights, since that of the
# ID images has almost no gradient left.
SUITED: dict[Any, tuple[str, ...]] = {
    "digits-multilabel": (
        *("optimizer.name=adamw", "optimizer.lr=0.001", "optimizer.outlier_batch_size=64"),
        *("pretrain.lr=0.005", "pretrain.epochs=40", "batch_norm=frozen"),
    ),
    ("digits-multilabel", "oe"): ("loss.alpha=0.1",),
    **{("digits-multilabel", method): ("loss.alpha=0.0003",) for method in ("energy", "greg", "gregplus")},
    ("digits-multilabel", "edge"): ("loss.alpha=0.1",),
}
# The embedded set that a method is for, where it is not the default one.
SUITED_DATA = {"edge": "digits-multilabel"}


@dataclass
class PretrainConfig:
    """The baseline: plain training on the ID images, or a model that was trained before."""

    epochs: int = option(20, "passes over the ID images")
    lr: float = option(0.05, "learning rate")
    checkpoint: str = option(
        "",
        "of a run (its baseline), or a state_dict of the model, to start from; pretrain.epochs is then 0 unless given",
    )


@dataclass
class OptimizerConfig:
    """For pretraining and fine-tuning alike, but for the learning rate."""

    name: str = option("sgd", "sgd (with Nesterov momentum) or adamw")
    lr: float = option(0.01, "learning rate of the fine-tuning")
    momentum: float = option(0.9, "of sgd")
    weight_decay: float = option(5e-4, "of all parameters")
    batch_size: int = option(64, "ID images a step")
    outlier_batch_size: int = option(128, "outliers a step")
    clip_norm: float = option(0.0, "of the gradient, over all parameters; 0: not clipped")
    implementation: str = option("auto", "fused: one kernel for all of a step; foreach; auto: fused on a GPU")


@dataclass
class ScheduleConfig:
    """Of the learning rate, over the steps of a stage."""

    name: str = option("cosine", "cosine to zero; step: times gamma at each milestone; constant")
    warmup: float = option(0.0, "epochs of linear growth from zero")
    milestones: list[float] = option([0.5, 0.75], "of step, as shares of the stage")
    gamma: float = option(0.1, "of step")


@dataclass
class OutlierPoolConfig:
    """Outliers chosen among cached features of them all, again and again while the model moves."""

    pool: str = option(
        "",
        "features of the images of data.outliers, by `oodkern extract`; auto: made as fine-tuning begins; empty: none",
    )
    policy: str = option("gregplus", f"how images are chosen: {', '.join(POLICIES)}")
    refresh: str = option("epoch", "when they are chosen anew: epoch, or every so many steps")
    count: int = option(0, "images chosen at a time; 0: as many as are used until the next choice")
    extract_every: int = option(0, "epochs after which features are made anew, by the model as it is then; 0: never")
    clusters: int = option(64, "of gregplus, dos: of the features")
    two_way: bool = option(
        True, "of gregplus: of each cluster the lowest and the highest energy; false: the lowest alone"
    )
    low: float = option(0.0, "of energy-window: the quantile of the pool's scores at which it begins")
    high: float = option(0.25, "of energy-window: and at which it ends")
    quantile: float = option(0.125, "of ntom: the share of the pool, by score, that is passed over")
    score: str = option("auto", "energy, joint_energy, max_logit, msp, or minus one; auto: energy, or -joint_energy")
    largest: bool = option(False, "of top-k: the largest scores; false: the smallest")
    threshold: float | None = option(None, "of margin: the score to be nearest to")


@dataclass
class TrainConfig:
    method: str = option("energy", f"one of {', '.join(METHODS)}")
    epochs: int = option(10, "of fine-tuning: passes over the ID images")
    seed: int = option(0, "of the initial weights, the order and the augmentation of the images")
    name: str = option("", "of the run folder; empty: made of the data, the method, the split and the seed")
    output: str = option("runs", "the folder of run folders")
    device: str = option("auto", "cuda where there is one; or cpu, cuda, cuda:1")
    threads: int = option(0, "of the CPU; 0: as many as PyTorch takes")
    precision: str = option("fp32", "fp32, bf16 or fp16 (by autocast, fp16 with a gradient scaler)")
    split_forward: bool = option(False, "ID and outliers one after the other: less memory, other BatchNorm statistics")
    accumulate: int = option(1, "forward passes that a step's images are parted into (with split_forward of each side)")
    checkpoint_activations: bool = option(False, "blocks are computed again in the backward pass: less memory")
    channels_last: bool = option(False, "memory format of images and convolutions")
    compile: str = option("none", "backbone: by torch.compile; none")
    batch_norm: str = option(
        "batch", "by each batch's statistics; frozen: in fine-tuning the starting model's; sync: of all processes"
    )
    head: str = option("full", "full: losses of logits; fused: of features and head, for which no logits are stored")
    parallel: str = option("ddp", "of several processes: ddp, each has the model; fully_shard, a share of it (FSDP2)")
    gather_negatives: bool = option(True, "terms that couple rows see those of all processes; false: of each one")
    parallel_head: bool = option(False, "with head=fused each process has a share of the classes")
    checkpoint_steps: int = option(0, "also write last.ckpt every so many steps; 0: after each epoch alone")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    outliers: OutlierPoolConfig = field(default_factory=OutlierPoolConfig)
    loss: Any = None  # the options of the method

    @property
    def folder(self) -> Path:
        path = self.data.name.partition(":")[2]
        if self.data.name.startswith("imglist:"):  # without the folder of its images
            path = str(path_of(self.data.name))
        data = re.sub(r"[^\w.-]+", "-", Path(path).name or path or self.data.name).strip(".-") or "data"
        data = "" if self.data.name == "digits" else f"{data}-"
        split = "" if self.data.split is None else f"-split{self.data.split}"
        return Path(self.output) / (self.name or f"{data}{self.method}{split}-seed{self.seed}")

    @property
    def multi_label(self) -> bool:
        return is_multi_label(self.data.name)


def policy_of(options: OutlierPoolConfig, multi_label: bool = False, **own: Any) -> Policy:
    """The policy that a run chooses outliers by, of those options that are its, and of its own arguments.

    Raises ValueError, naming the option.
    """
    if options.score == AUTO:
        options = replace(options, score="-joint_energy" if multi_label else "energy")
    if options.policy == "margin" and options.threshold is None:
        raise ValueError("threshold: expected a number, which outliers.policy=margin needs, got null")
    kind = POLICIES[options.policy]
    known = {one.name for one in fields(options)} & {one.name for one in fields(kind)}
    known -= {"two_way"} if options.policy == "dos" else set()  # which is gregplus of one side
    return kind(**{name: getattr(options, name) for name in known}, **own)


def check_outliers(options: OutlierPoolConfig, method: Any) -> None:
    """Raises ValueError, naming the key, for what no training can be made of, before any file is opened."""
    if options.policy not in POLICIES:
        close = difflib.get_close_matches(options.policy, POLICIES, n=1, cutoff=0.5)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"outliers.policy: expected one of {', '.join(POLICIES)}, got {options.policy!r}{guess}")
    if not re.fullmatch(r"epoch|0*[1-9]\d{0,11}", options.refresh):
        raise ValueError(f"outliers.refresh: expected epoch or a number of steps from 1 on, got {options.refresh!r}")
    for key in ("count", "extract_every"):
        if getattr(options, key) < 0:
            raise ValueError(f"outliers.{key}: expected 0 or more, got {getattr(options, key)}")
    if not options.pool:
        given = next((one.name for one in fields(options) if getattr(options, one.name) != one.default), "")
        if given:
            raise ValueError(f"outliers.pool: expected features, or auto, for outliers.{given} to count; got none")
        return
    if not method.uses_outliers:
        raise ValueError(
            f"outliers.pool: expected none, since {method.name} takes no outlier images, got {options.pool}"
        )
    try:
        policy_of(options)
    except ValueError as error:
        raise ValueError(f"outliers.{error}") from None
