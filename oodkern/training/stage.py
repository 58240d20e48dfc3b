"""One optimisation: a model, a loss, two streams, an optimizer and a schedule, step by step."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oodkern.classifier import Classifier
from oodkern.data import Batches, ImageSet, OODSplit, augmentation, stream
from oodkern.methods.objective import Objective
from oodkern.processes import ALONE, Processes, is_sharded, whole
from oodkern.schema import ScheduleConfig, TrainConfig
from oodkern.training.memory import Lean, memory_format
from oodkern.training.passes import Gradients
from oodkern.training.pool import OutlierPool
from oodkern.training.replica import replica_of
from oodkern.training.shards import shared_out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # a float16 gradient that overflows even at this scale is no matter of scale
STREAMS = {"pretrain": (0, 1), "method": (2, 3)}  # numbers of the ID and the outlier stream


class NotFinite(Exception):
    """The loss, its gradient or what the model makes of the data became NaN or infinite."""


def rate_at(step: int, steps: int, warmup: int, schedule: ScheduleConfig) -> float:
    """The learning rate of a step as a share of the full one: linear warm-up, then the schedule over the rest."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    if schedule.name == "cosine":
        return (1 + math.cos(math.pi * min(done, 1.0))) / 2
    if schedule.name == "step":
        return schedule.gamma ** sum(step / max(steps, 1) >= milestone for milestone in schedule.milestones)
    return 1.0


def build_optimizer(
    config: TrainConfig, rates: list[tuple[list[nn.Parameter], float]], lr: float
) -> torch.optim.Optimizer:
    """`rates`: parameters, and their learning rates in units of `lr`; kept in each group as `factor`."""
    options = config.optimizer
    groups = [{"params": parameters, "factor": factor} for parameters, factor in rates if parameters]
    kind = options.implementation
    on_gpu = all(one.is_cuda for parameters, _ in rates for one in parameters)
    # Of None PyTorch chooses, and does not choose fused.
    how: Any = {"fused": True if kind == "fused" or (kind == "auto" and on_gpu) else None}
    how |= {"foreach": True} if kind == "foreach" else {}
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=options.weight_decay, **how)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
        **how,
    )


def clipped(parameters: list[Tensor], limit: float) -> float:
    """The norm of the whole gradient, which is brought down to a limit; of shares it is that of all processes."""
    total = torch.zeros((), dtype=torch.float64)
    for shares in (False, True):
        gradients = [one.grad for one in parameters if one.grad is not None and is_sharded(one) == shares]
        if gradients:
            norm: Any = torch.nn.utils.get_total_norm(gradients)
            total = total.hypot((norm.full_tensor() if shares else norm).cpu().double())
    for shares in (False, True):
        of = [one for one in parameters if is_sharded(one) == shares]
        if of and math.isfinite(limit):
            torch.nn.utils.clip_grads_with_norm_(of, limit, total.to(of[0].device, torch.float32))
    return float(total)


def placed(value: Any, device: torch.device) -> Any:
    """Nested dicts with their tensors on a device: checkpoints are read to the CPU."""
    if isinstance(value, dict):
        return {name: placed(one, device) for name, one in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


class Stage:
    """`advance()` is one step over a batch of ID images and one of outliers.

    By default one joint forward pass over [ID; outliers]: BatchNorm then normalises both by the statistics of the
    whole batch. With `split_forward` each part has its own pass and its own statistics, and with `accumulate` each has
    several; only one pass's activations are alive then: see `oodkern.training.passes`.

    The loss is formed by an Objective, which also chooses the step's outliers where a method does. With `head=fused` it
    is formed of the model's features and its head: see `oodkern.training.fused`. With a `pool` the outliers are those
    that it chooses; with `data.workers` a loader begins anew at each choice.

    Batches are of all processes: each reads its share of either stream, and every step's gradient is that of the whole.

    `state_dict()` and `load_state_dict()` carry everything that the next step depends on, the random state of the
    process apart.
    """

    def __init__(
        self,
        kind: Literal["pretrain", "method"],
        config: TrainConfig,
        split: OODSplit,
        model: Classifier,
        objective: Objective,
        outliers: bool,
        device: torch.device,
        processes: Processes = ALONE,
        pool: OutlierPool | None = None,
    ) -> None:
        self.model: Any = model
        self.pool = pool
        self.objective, self.processes = objective, processes
        objective.fused, objective.processes = config.head == "fused", processes
        self.kind, self.config, self.device = kind, config, device
        self.name = config.method if kind == "method" else kind
        options = config.optimizer
        self.epochs = config.epochs if kind == "method" else config.pretrain.epochs
        self.steps_per_epoch = max(len(split.train) // options.batch_size, 1)
        self.steps = self.epochs * self.steps_per_epoch
        self.steps_before = config.pretrain.epochs * self.steps_per_epoch if kind == "method" else 0
        numbers = STREAMS[kind]
        self.id_batches = self._batches(split.train, options.batch_size, numbers[0], split.augmentation)
        self.outlier_batches = None
        if outliers:
            size = objective.candidates or options.outlier_batch_size
            self.outlier_batches = self._batches(split.outliers, size, numbers[1], split.outlier_augmentation)
            if pool is not None:
                pool.join(self.steps_per_epoch, size, objective.every)
        self.labels = split.train.labels
        self.format = memory_format(config)
        self.replica = replica_of(model, objective, config, processes, device)
        objective.inner_gradient = self.replica.inner_gradient
        self.lean = Lean(self.replica.model, config)
        self.lr = config.optimizer.lr if kind == "method" else config.pretrain.lr
        self.optimizer = build_optimizer(
            config, [(list(self.replica.model.parameters()), 1.0), *objective.learning_rates()], self.lr
        )
        self.parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        self.warmup = round(config.schedule.warmup * self.steps_per_epoch)
        self.dtype = DTYPES[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.gradients = Gradients(self.replica, objective, config, processes, self.autocast, self.scaled)
        self.step = 0
        self.totals: dict[str, list[float]] = {}  # of the epoch: sums over its steps, and how many
        self.batch: dict[str, Any] | None = None  # of the last step
        self._id_stream: Any = None
        self._outlier_stream: Any = None
        self._indices: Tensor  # of the ID images read last, this process's
        self._candidates: Tensor | None = None  # the outliers read last

    def _batches(self, images: ImageSet, size: int, number: int, augment: str) -> Batches:
        return Batches(images, size, self.config.seed, number, augmentation(augment), self.processes)

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.steps_per_epoch == 0

    @property
    def outliers_per_step(self) -> int:
        return self.config.optimizer.outlier_batch_size if self.outlier_batches else 0

    @property
    def images_per_step(self) -> int:
        return self.id_batches.batch_size + self.outliers_per_step

    def next_batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """This process's ID images of the step, their targets, and its outliers of those read for it, on the device."""
        workers, pin = self.config.data.workers, self.device.type == "cuda"
        outliers, number = self.outlier_batches, self.step // self.objective.every
        if self.pool is not None:
            outliers, number = self.pool.batches_at(self), self.pool.batch_number(self.step)
            if outliers is not self.outlier_batches:
                self.outlier_batches, self._outlier_stream = outliers, None
        if self._id_stream is None:  # the streams of a resumed stage begin where the last step ended
            self._id_stream = stream(self.id_batches, self.step, workers, pin, indices=True)
        if outliers is not None and self._outlier_stream is None:
            self._outlier_stream = stream(outliers, number, workers, pin)
        images, target, self._indices = next(self._id_stream)
        move: Any = {"device": self.device, "non_blocking": True, "memory_format": self.format}
        if self._outlier_stream is not None and (self._candidates is None or self.step % self.objective.every == 0):
            self._candidates = next(self._outlier_stream)[0].to(**move)
        return images.to(**move), target.to(self.device, non_blocking=True), self._candidates

    def set_training(self) -> None:
        """Training mode, but for what is frozen of it."""
        self.replica.model.train()
        if self.kind == "method" and self.config.batch_norm == "frozen":
            for module in self.replica.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def let_go(self) -> None:
        """Of the streams, and so of their processes: they begin anew where the next step needs them."""
        self._id_stream = self._outlier_stream = self._candidates = None

    def close(self) -> None:
        """The end: leaves the model as it came."""
        self.let_go()
        self.lean.undo()

    def advance(self) -> dict[str, float]:
        """One step; its loss, the loss's parts, and the norm of the gradient."""
        started = time.perf_counter()
        images, target, outliers = self.next_batch()
        self.objective.begin(self.step / max(self.steps, 1))
        if outliers is not None:
            with self.autocast():
                outliers = self.objective.choose(self.replica.model, outliers, self.step)
        self.set_training()
        self.optimizer.zero_grad(set_to_none=True)
        self.batch = {
            "images": images,
            "target": target,
            "outliers": outliers,
            "stage": self.name,
            "step": self.step + 1,
        }
        indices = self.id_batches.read_by_all(self.step, self._indices, self.device)
        counts = len(indices), self.outliers_per_step
        target = self.labels[indices].to(self.device)
        parts = self.over_processes(self.gradients(images, outliers, target, indices, counts, self.step))
        if not math.isfinite(parts["loss"]):
            raise NotFinite(f"the loss is {parts['loss']}")
        self.replica.end_backward(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = clipped(self.parameters, self.config.optimizer.clip_norm or math.inf)
        # float16 gradients may overflow: the scaler then leaves this step out and lowers its scale.
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < SMALLEST_SCALE):
            raise NotFinite(f"the gradient's norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["factor"] * rate_at(self.step, self.steps, self.warmup, self.config.schedule)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.replica.end_step()
        self.step += 1
        if math.isfinite(norm):
            parts["gradient_norm"] = norm
        parts["seconds"] = time.perf_counter() - started
        for name, value in parts.items():
            total, count = self.totals.get(name, (0.0, 0))
            self.totals[name] = [total + value, count + 1]
        return parts

    def over_processes(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """Sums over the processes: of means over the whole step's rows each has its own rows' part."""
        values = torch.stack([one.double() for one in parts.values()])
        return dict(zip(parts, self.processes.sum(values).tolist(), strict=True))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaled(self, value: Tensor) -> Tensor:
        return self.scaler.scale(value)

    def means(self) -> dict[str, float]:
        """Means over the epoch's steps (those that had the part), and images per second; the sums start anew."""
        means = {name: total / count for name, (total, count) in self.totals.items()}
        self.totals = {}
        return means | {"images_per_second": self.images_per_step / max(means.pop("seconds"), 1e-9)}

    def state_dict(self) -> dict[str, Any]:
        """Of whole tensors: every process has to ask where each has a share."""
        pool = {} if self.pool is None else {"pool": self.pool.state_dict()}
        return {
            **pool,
            "step": self.step,
            "totals": self.totals,
            **self.objective.state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.let_go()
        self.step, self.totals = state["step"], dict(state["totals"])
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"], self.device)
        own = {name: value for name, value in state.items() if name not in ("optimizer", "scaler", "pool")}
        self.objective.load_state_dict(placed(own, self.device))
        self.optimizer.load_state_dict(shared_out(state["optimizer"], self.parameters))
        self.scaler.load_state_dict(state["scaler"])
