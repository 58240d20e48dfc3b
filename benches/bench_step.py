"""Training steps of the methods against one of Outlier Exposure: `pytest benches/bench_step.py`.

A step is what `Stage.advance` does: images read, outliers chosen, forward, loss and penalty, backward, optimizer. The
losses of pytorch-ood that are the same step as ours are trained by the loop that a user would write around them.
"""

import copy
import functools
import time

import pytest
import torch
from runner import CLOCK, contests, replay, smoke
from torch import nn

from oodkern import energy
from oodkern.benchmarks.case import Case, Contender, case
from oodkern.benchmarks.timing import interleaved
from oodkern.config import load_config
from oodkern.data import ArraySet, OODSplit, stream
from oodkern.methods import METHODS
from oodkern.training.stage import Stage
from oodkern.training.start import build_classifier, setting_of

# Overrides of each method, what is compared with ("oe") among them; `edge` is for multi-label classifiers alone.
# OAL's teacher is asked about every batch, as in any run with augmentation, or was once about the training set; EDGE's
# gap counts, as in the second half of a run.
OVERRIDES = {
    "single-label": {
        **{name: (f"method={name}",) for name, method in METHODS.items() if method.score_names[0] is not None},
        "oal": ("method=oal", "loss.teacher_outputs=online"),
        "oal, cached": ("method=oal", "loss.teacher_outputs=cached"),
    },
    "multi-label": {
        "oe": ("method=oe", "data.name=digits-multilabel"),
        "edge": ("method=edge", "data.name=digits-multilabel", "loss.gap_start=0"),
    },
}
# At this rate weights stay what they are, and margins go on selecting half of the images.
COMMON = (
    "model.name=resnet18",
    "optimizer.name=sgd",
    "optimizer.lr=1e-12",
    "batch_norm=batch",
    "schedule.name=constant",
)
CLASSES, TRAINING, AUXILIARY, SIDE = 10, 640, 1_280, 32
CPU = torch.device("cpu")


def images_in_memory(multi_label, generator):
    """Random images, those of the known classes around a pattern of their class; outliers have less contrast."""
    rand = functools.partial(torch.rand, generator=generator)
    classes = tuple(map(str, range(CLASSES)))
    labels = torch.arange(TRAINING) % CLASSES
    patterns = rand(CLASSES, 3, SIDE, SIDE)
    known = (patterns[labels] + rand(TRAINING, 3, SIDE, SIDE)) / 2
    unknown = 0.4 + 0.2 * rand(AUXILIARY, 3, SIDE, SIDE)
    targets = (rand(TRAINING, CLASSES) < 0.2).float() if multi_label else labels
    train, outliers = ArraySet(known, targets, classes), ArraySet(unknown, torch.full((AUXILIARY,), -1))
    return OODSplit("random", train, train, train, outliers, outliers, {}, classes, multi_label)


@torch.no_grad()
def start(config, split):
    """A starting model, and margins that select half of a batch: the medians of its energies.

    Energies are those of a step, normalised by the statistics of the batch, which become the running ones.
    """
    model = build_classifier(config, split)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    count, more = config.optimizer.batch_size, config.optimizer.outlier_batch_size
    images = torch.cat([split.train.array[:count], split.outliers.array[:more]])
    energies = energy(model(images))
    for norm in norms:
        norm.momentum = 0.1
    return model, {"margin_in": float(energies[:count].median()), "margin_out": float(energies[count:].median())}


def stage_of(overrides, split):
    config = load_config(None, [*COMMON, *overrides])
    torch.manual_seed(0)
    model, decided = start(config, split)
    method = METHODS[config.method](config.loss, split.multi_label)
    objective = method.objective(decided, setting_of(config, split, copy.deepcopy(model), CPU))
    return Stage("method", config, split, model, objective, method.uses_outliers, CPU)


def step(stage):
    """A step. Its batch and gradients are handed out: the next one finds only parameters, statistics and momentum."""
    parts = stage.advance()
    found = {"parts": parts, "batch": stage.batch, "gradients": [one.grad for one in stage.parameters]}
    stage.optimizer.zero_grad(set_to_none=True)
    stage.let_go()
    stage.batch = None
    return found


class Loop:
    """The loop of a user: a copy of a stage's model, its batches, and a loss of logits and labels, of outliers -1."""

    def __init__(self, stage, loss):
        options = stage.config.optimizer
        self.model, self.loss = copy.deepcopy(stage.model), loss
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters, options.lr, options.momentum, weight_decay=options.weight_decay, nesterov=True
        )
        self.known, self.outliers = stream(stage.id_batches), stream(stage.outlier_batches)

    def step(self):
        (images, target), (outliers, unknown) = next(self.known), next(self.outliers)
        self.model.train()
        value = self.loss(self.model(torch.cat([images, outliers])), torch.cat([target, unknown]))
        value.backward()
        self.optimizer.step()
        found = {"parts": {"loss": value.item()}, "gradients": [one.grad for one in self.parameters]}
        self.optimizer.zero_grad(set_to_none=True)
        return found


def theirs_oe(stage):
    """Theirs is a mean over the whole batch, which these factors make ours."""
    from pytorch_ood.loss import OutlierExposureLoss

    known, unknown = stage.id_batches.batch_size, stage.outliers_per_step
    loss = OutlierExposureLoss(alpha=stage.objective.loss.alpha * known / unknown)
    return lambda logits, target: loss(logits, target) * ((known + unknown) / known)


def theirs_energy(stage):
    from pytorch_ood.loss import EnergyRegularizedLoss

    ours = stage.objective.loss
    return EnergyRegularizedLoss(ours.alpha, ours.margin_in, ours.margin_out)


THEIRS = {"oe": theirs_oe, "energy": theirs_energy}


class Steps(dict):
    """Stages and loops by contender, each made when it is first asked for."""

    def __init__(self, kind, sizes, split):
        super().__init__()
        self.kind, self.sizes, self.split = kind, sizes, split

    def __missing__(self, name):
        if name in OVERRIDES[self.kind]:
            self[name] = stage_of((*OVERRIDES[self.kind][name], *self.sizes), self.split)
        else:
            stage = self[name.partition(",")[0]]
            self[name] = Loop(stage, THEIRS[name.partition(",")[0]](stage))
        return self[name]


def sizes_of(images, width):
    """Of a step's images a third is known, as 32 of 96 are."""
    known = images // 3
    return f"optimizer.batch_size={known}", f"optimizer.outlier_batch_size={images - known}", f"model.width={width}"


def check_selected(parts, options):
    """Half of each side, within three deviations: margins are medians of as many images as a batch has."""
    for side, count in (("selected_in", options.batch_size), ("selected_out", options.outlier_batch_size)):
        assert abs(parts.get(side, 0.5) - 0.5) < 1.5 * (2 / count) ** 0.5, (side, parts)


def of_stage(name, steps):
    return step(steps[name])


def of_loop(name, steps):
    return steps[name].step()


def inputs(kind, sizes, generator):
    return (Steps(kind, sizes, images_in_memory(kind == "multi-label", generator)),)


@case
def methods(*, kind: str, images: int, width: int) -> Case:
    loops = {f"{name}, pytorch-ood": ("pytorch_ood.loss",) for name in THEIRS if kind == "single-label"}
    return Case(
        room="methods",
        title=f"{kind}: ResNet-18 at 32 x 32, {CLASSES} classes",
        sizes={"images": images, "width": width},
        dtype="float32",
        passes="whole",
        inputs=functools.partial(inputs, kind, sizes_of(images, width)),
        contenders={
            **{name: Contender(functools.partial(of_stage, name)) for name in OVERRIDES[kind]},
            **{name: Contender(functools.partial(of_loop, name), needs=needs) for name, needs in loops.items()},
        },
        base="oe",
    )


CASES = [methods(kind=kind, images=96, width=16) for kind in OVERRIDES]

test_methods = contests(CASES)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("kind", OVERRIDES)
def test_premises(kind, benchmark, request):
    """What is compared is methods, not how images are read: that is a twentieth of a step at most. Margins go on
    selecting half of the images; and the loops' gradients are ours."""
    found = CASES[list(OVERRIDES).index(kind)]
    found = smoke(found) if request.config.getoption("--smoke") else found
    ((steps,), _) = found.data(CPU)
    names = [name for name, one in found.contenders.items() if one.missing(CPU) is None]
    first = {name: found.contenders[name].function(steps)["gradients"] for name in names}
    for name in set(names) - set(OVERRIDES[kind]):
        torch.testing.assert_close(first[name], first[name.partition(",")[0]], rtol=1e-3, atol=1e-5)
    reading = {}
    for name in OVERRIDES[kind]:
        stage = steps[name]
        started = time.perf_counter()
        stage.advance()
        took = time.perf_counter() - started
        reading[name] = interleaved({"reading": stage.next_batch}, CPU, 0.2)["reading"]
        assert reading[name].median < 0.05 * took, name
        check_selected(stage.means(), stage.config.optimizer)
    benchmark.group = found.name
    benchmark.extra_info.update(room=found.room, case=found.title, contender="images read of a step of oe")
    replay(benchmark, reading["oe"])
