"""The memory of a training step, foretold without making it, and the largest batch that fits.

The step is run by the trainer's own code, on fake tensors: they have shapes, dtypes and a device, and no numbers.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, OutlierPoolConfig, TrainConfig, check_values, nearest, schema_of
from oodkern.data import OODSplit, build_split
from oodkern.detector import find_device
from oodkern.methods import METHODS
from oodkern.training.fitting import first_true, largest_fitting
from oodkern.training.fused import check_fused_head
from oodkern.training.memory import blocks_of, memory_format
from oodkern.training.meter import FakeCopies, Meter, WorstCase, check_fake
from oodkern.training.metered import Images, Peak, metered, step, tensors_of
from oodkern.training.stage import Stage
from oodkern.training.start import build_classifier, setting_of

CONFIGURED = "as configured"
WAYS: dict[str, dict[str, Any]] = {
    CONFIGURED: {},
    "split_forward": {"split_forward": True},
    "accumulate=2": {"accumulate": 2},
    "accumulate=4": {"accumulate": 4},
    "checkpoint_activations": {"checkpoint_activations": True},
    "head=fused": {"head": "fused"},
}
CUDA_BLOCK = 512  # bytes
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Proposal:
    """The largest batch that fits: ID images and outliers a step, and the predicted peak in bytes."""

    batch_size: int
    outlier_batch_size: int
    bytes: int
    all_images: bool  # whether it is as many as there are to train with, beyond which none was tried
    limit: str = ""  # why one ID image more cannot be trained with, where that is no matter of memory


@dataclass(frozen=True)
class Cell:
    """A method's step made in one way: its peak, or why there is none; the largest batch, where one was asked for."""

    peak: Peak | None
    reason: str = ""
    proposal: Proposal | None = None


@dataclass(frozen=True)
class Measured:
    """A step on random images, on a CUDA device."""

    bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found: `cells[method][way]` with the ways of WAYS."""

    config: TrainConfig
    device: str
    memory: int | None
    cells: Mapping[str, Mapping[str, Cell]]
    measured: Measured | None

    @property
    def configured(self) -> Cell:
        return self.cells[self.config.method][CONFIGURED]

    def as_dict(self) -> dict[str, Any]:
        options = self.config.optimizer
        return {
            "method": self.config.method,
            "device": self.device,
            "batch_size": options.batch_size,
            "outlier_batch_size": options.outlier_batch_size,
            "memory": self.memory,
            "methods": {
                name: {way: asdict(cell) for way, cell in by_way.items()} for name, by_way in self.cells.items()
            },
            "measured": None if self.measured is None else asdict(self.measured),
        }


def plan(
    config: TrainConfig, methods: Sequence[str] = (), memory: int | None = None, split: OODSplit | None = None
) -> Plan:
    """The peak memory of a training step of the configured method and of others, for each of WAYS.

    Counted are parameters, buffers and gradients, the optimizer's state, the starting model (which a run keeps) and a
    teacher, images, activations and whatever else passes from op to op. Where a step depends on numbers it is the
    worst one: all of GReg's samples are selected, EDGE's gap and separation's terms are on. Not seen are what kernels
    allocate inside (convolutions' and cuBLAS's workspaces), the memory of a CUDA context, fragments, and the k-means of
    `gregplus`; the step is of one process, and not compiled.

    Args:
        config: its optimizer, batch sizes and ways count for all methods.
        methods: more of METHODS, with their default options; "all": those that suit the data.
        memory: bytes, for which the largest batches are looked for; with a CUDA device None means all of its memory.
        split: the data, where it is built already; of its images at most 2,000 are read, for their mean and deviation.

    Raises ConfigError for a configuration that cannot be trained, and where not one image a step of its method fits.
    """
    configs = [of_method(config, name) for name in chosen_methods(config, methods)]
    device = find_device(config.device)
    try:
        split = split or build_split(config.data)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    room, source = memory, "--memory"
    if room is None and device.type == "cuda":
        room, source = torch.cuda.get_device_properties(device).total_memory, "device"
    built: Any = build_classifier(config, split, weights=False)
    model: Classifier = built.to(memory_format=memory_format(config))
    found: dict[str, dict[str, Cell]] = {}
    for one in configs:
        steps = Steps(one, split, model, device)
        cells = found[one.method] = {}
        for way, changes in WAYS.items():
            cells[way] = steps.cell(changes, room)
            if one is configs[0] and (reason := cells[CONFIGURED].reason):
                raise ConfigError(reason)
        if one is configs[0] and room is not None and not any(cell.proposal for cell in cells.values()):
            raise ConfigError(f"{source}: expected room for one image a step at least, which {room:,} bytes are not")
    measured = measure(configs[0], split, model, device) if device.type == "cuda" else None
    return Plan(config, str(device), room, found, measured)


def chosen_methods(config: TrainConfig, methods: Sequence[str]) -> list[str]:
    """The configured one first. Raises ConfigError for what is no method."""
    for name in methods:
        if name not in METHODS and name != "all":
            known = ", ".join([*METHODS, "all"])
            raise ConfigError(f"--methods: expected of {known}, got {name!r}{nearest(name, METHODS)}")
    suited = [name for name, method in METHODS.items() if method.score_names[config.multi_label] is not None]
    names = [one for name in methods for one in (suited if name == "all" else [name])]
    return list(dict.fromkeys([config.method, *names]))


def of_method(config: TrainConfig, name: str) -> TrainConfig:
    """A configuration for another method, with its default options. Raises ConfigError where it does not go with it."""
    if name == config.method:
        return replace(config, compile="none", outliers=OutlierPoolConfig())
    own: dict[str, Any] = {one.name: getattr(config, one.name) for one in fields(config) if one.name != "loss"}
    found = schema_of(name)(**own | {"method": name, "compile": "none", "outliers": OutlierPoolConfig()})
    try:
        METHODS[name](found.loss, config.multi_label)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return found


class Steps:
    """Steps of one method from one starting model, however large and however they are made."""

    def __init__(self, config: TrainConfig, split: OODSplit, model: Classifier, device: torch.device) -> None:
        self.config, self.split, self.model, self.device = config, split, model, device
        self.shape = split.train.shape
        self.method = METHODS[config.method](config.loss, split.multi_label)
        self.setting = setting_of(config, split, copy.deepcopy(model), CPU)
        # A teacher is read once, however many objectives are made.
        self.setting = replace(self.setting, load_classifier=functools.cache(self.setting.load_classifier))
        try:
            self.method.check(self.setting)
        except (ValueError, ImportError) as error:
            raise ConfigError(str(error)) from None

    def cell(self, changes: Mapping[str, Any], memory: int | None) -> Cell:
        config = replace(self.config, **changes)
        if reason := self.refused(config, changes):
            return Cell(None, reason)
        try:
            peak = self.peak(config)
        except ConfigError as error:
            return Cell(None, str(error))
        return Cell(peak, proposal=None if memory is None else self.largest(config, memory, peak.bytes))

    def refused(self, config: TrainConfig, changes: Mapping[str, Any]) -> str:
        """Why a step cannot be made in this way; nothing where it can."""
        if "split_forward" in changes and not self.method.uses_outliers:
            return f"split_forward: {config.method} has no outliers"
        blocks = [one for one in blocks_of(self.model.model) if self.model.head not in one.modules()]
        if config.checkpoint_activations and not blocks:
            return "checkpoint_activations: the model has no blocks"
        try:
            check_values(config)
            if config.head == "fused":
                few = self.split.train.images(torch.arange(min(16, len(self.split.train))))
                check_fused_head(self.model, [self.method.build_loss({})], few)
        except ConfigError as error:
            return str(error)
        return ""

    def peak(self, config: TrainConfig) -> Peak:
        """Of a step on fake tensors. Raises ConfigError where it cannot be made."""
        # Of a private module, without which nothing but this is to break.
        from torch._subclasses import fake_tensor as fake

        options = config.optimizer
        setting = replace(self.setting, batch_size=options.batch_size, outlier_batch_size=options.outlier_batch_size)
        objective = self.method.sketch({}, setting)
        # An op without a rule for fake tensors would be run on real ones.
        mode = fake.FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        with FakeCopies(mode, self.device):
            model, kept, objective = copy.deepcopy((self.model, setting.model, objective))
        held = [one for module in (model, kept) for one in (*module.parameters(), *module.buffers())]
        check_fake([*held, *tensors_of(objective)])
        meter = Meter(self.device.type, CUDA_BLOCK if self.device.type == "cuda" else 1)
        try:
            with mode, WorstCase(), meter:
                stage = Stage("method", config, self.split, model, objective, self.method.uses_outliers, self.device)
                return metered(stage, kept, meter, Images(stage, self.shape, torch.empty))
        except (
            fake.UnsupportedOperatorException,
            fake.DynamicOutputShapeException,
            fake.DataDependentOutputException,
        ) as error:
            raise ConfigError(f"model: its {error.func} has no rule for tensors without numbers") from None
        except ValueError as error:
            few = "Expected more than 1 value per channel" in str(error)  # BatchNorm's
            key = f"optimizer.batch_size: {options.batch_size} does not make a step: " if few else ""
            raise ConfigError(f"{key}{error}") from None

    def largest(self, config: TrainConfig, memory: int, known: int) -> Proposal | None:
        """By secants, since the peak is nearly affine in the batch; what is proposed fits, and one more does not."""
        options = config.optimizer
        ratio = options.outlier_batch_size / options.batch_size

        def sized(batch: int) -> TrainConfig:
            outliers = max(round(batch * ratio), 1)
            return replace(config, optimizer=replace(options, batch_size=batch, outlier_batch_size=outliers))

        def refusal(batch: int) -> str:
            try:
                check_values(sized(batch))
            except ConfigError as error:
                return str(error)
            return ""

        @functools.cache
        def size(batch: int) -> float:
            """Infinite where there is no such step."""
            if batch == options.batch_size:
                return known
            try:
                return float("inf") if refusal(batch) else self.peak(sized(batch)).bytes
            except ConfigError:
                return float("inf")

        # Batches that can be trained with are an interval around the configured one; its end takes no step to find.
        images, start = len(self.split.train), options.batch_size
        least = first_true(lambda batch: size(batch) < float("inf"), start)
        most = start + first_true(lambda more: bool(refusal(start + more)), max(images - start, 0) + 1) - 1
        batch = largest_fitting(size, memory, least, most, start)
        if batch == 0:
            return None
        outliers = sized(batch).optimizer.outlier_batch_size if self.method.uses_outliers else 0
        limit = refusal(batch + 1) if batch == most < images else ""
        return Proposal(batch, outliers, int(size(batch)), batch >= images, limit)


def measure(config: TrainConfig, split: OODSplit, model: Classifier, device: torch.device) -> Measured | None:
    """A real step on a CUDA device, after two that warm up; None where its memory does not do."""
    before = torch.cuda.memory_allocated(device)
    method = METHODS[config.method](config.loss, split.multi_label)
    try:
        student, kept = (copy.deepcopy(model).to(device) for _ in range(2))
        setting = setting_of(config, split, kept, device)
        objective = method.sketch({}, setting)
        objective.loss.to(device)
        stage = Stage("method", config, split, student, objective, method.uses_outliers, device)
        # Steps are made without the scaler: taken as they are, scaled gradients would make weights infinite.
        stage.scaler = torch.amp.GradScaler(device.type, enabled=False)
        images = Images(stage, split.train.shape, torch.rand)
        milliseconds = 0.0
        for _ in range(3):
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            step(stage, images)
            torch.cuda.synchronize(device)
            milliseconds = (time.perf_counter() - started) * 1e3
    except torch.cuda.OutOfMemoryError:
        return None
    return Measured(torch.cuda.max_memory_allocated(device) - before, milliseconds)
