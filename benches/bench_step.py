"""Training steps: `pytest benches/bench_step.py`.

At many classes, losses of features and head against those of logits; and each method against Outlier Exposure
(`-k methods`).
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from measure import Row, interleaved_medians, peak_megabytes, relative_error
from torch import nn

from oodkern import energy
from oodkern.config import load_config
from oodkern.data import ArraySet, OODSplit
from oodkern.losses import EnergyLoss, OutlierExposureLoss
from oodkern.methods import METHODS
from oodkern.training.stage import Stage
from oodkern.training.start import build_classifier, setting_of

ID, OUTLIERS, D, K = 256, 256, 512, 21_841
ALPHA, MARGIN_IN, MARGIN_OUT = 0.1, -13.5, -12.0  # about the energies of the random logits here, so that hinges act


def eager_energy(logits, target):
    energies = -torch.logsumexp(logits, -1)
    above, below = (energies[:ID] - MARGIN_IN).relu(), (MARGIN_OUT - energies[ID:]).relu()
    hinges = above.square().mean() + below.square().mean()
    return F.cross_entropy(logits[:ID], target) + ALPHA * hinges


def eager_outlier_exposure(logits, target):
    outliers = logits[ID:]
    flat = torch.logsumexp(outliers, -1) - outliers.mean(-1)
    return F.cross_entropy(logits[:ID], target) + ALPHA * flat.mean()


LOSSES = {
    "energy": (EnergyLoss(ALPHA, MARGIN_IN, MARGIN_OUT), eager_energy),
    "outlier exposure": (OutlierExposureLoss(ALPHA), eager_outlier_exposure),
}


class Model(nn.Module):
    """A backbone so small that the head is what takes time."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, D), nn.ReLU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.head = nn.Linear(D, K)
        nn.init.normal_(self.head.weight, std=2 * D**-0.5)  # logits of deviation 2


def fused(loss, model, images, target):
    return loss.from_features(model.backbone(images), model.head.weight, model.head.bias, target, ID)


def eager(loss, model, images, target):
    return loss(F.linear(model.backbone(images), model.head.weight, model.head.bias), target)


def step(function, loss, model, images, target):
    """Forward and backward: the gradients of all parameters, and nothing else."""
    return torch.autograd.grad(function(loss, model, images, target), list(model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_step(name, dtype, benchmark, record, rounds):
    torch.manual_seed(0)
    ours, theirs = LOSSES[name]
    model = Model().to(getattr(torch, dtype))
    images = torch.randn(ID + OUTLIERS, 64).to(getattr(torch, dtype))
    target = torch.randint(0, K, (ID,))
    contenders = {
        "oodkern": lambda: step(fused, ours, model, images, target),
        "eager": lambda: step(eager, theirs, model, images, target),
    }
    exact = step(eager, theirs, copy.deepcopy(model).double(), images.double(), target)
    # The worst of all gradients.
    errors = {label: max(map(relative_error, work(), exact)) for label, work in contenders.items()}
    del exact
    record(
        Row(
            room="step",
            case=f"{name} loss, forward + backward",
            shape=(ID + OUTLIERS, D, K),
            dtype=dtype,
            milliseconds=interleaved_medians(contenders, rounds),
            megabytes={label: peak_megabytes(work) for label, work in contenders.items()},
            error=errors,
        )
    )
    benchmark.pedantic(contenders["oodkern"], rounds=1)
    assert errors["oodkern"] <= 2 * errors["eager"] + 1e-5


# Overrides of each contender, what is compared with ("oe") among them; `edge` is for multi-label classifiers alone.
# OAL's teacher is asked about every batch, as in any run with augmentation, or was once about the training set; EDGE's
# gap counts, as in the second half of a run.
CONTENDERS = {
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
    "model.width=16",
    "optimizer.name=sgd",
    "optimizer.lr=1e-12",
    "optimizer.outlier_batch_size=128",
    "batch_norm=batch",
    "schedule.name=constant",
)
CLASSES, TRAINING, AUXILIARY, SIDE = 10, 640, 1_280, 32
CPU = torch.device("cpu")


def images_in_memory(multi_label):
    """Random images, those of the known classes around a pattern of their class; outliers have less contrast."""
    classes = tuple(map(str, range(CLASSES)))
    labels = torch.arange(TRAINING) % CLASSES
    patterns = torch.rand(CLASSES, 3, SIDE, SIDE)
    known = (patterns[labels] + torch.rand(TRAINING, 3, SIDE, SIDE)) / 2
    unknown = 0.4 + 0.2 * torch.rand(AUXILIARY, 3, SIDE, SIDE)
    targets = (torch.rand(TRAINING, CLASSES) < 0.2).float() if multi_label else labels
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


def peak_of_step(stage):
    """In megabytes, beyond parameters, running statistics and momentum: what the step before left is let go first."""
    stage.optimizer.zero_grad(set_to_none=True)
    stage.let_go()
    stage.batch = None
    return peak_megabytes(stage.advance)


@pytest.fixture(scope="module")
def steps(rounds):
    """Stages by kind of label and contender, and the milliseconds of their steps, all taken in turns."""
    stages = {}
    for kind, contenders in CONTENDERS.items():
        torch.manual_seed(1)
        split = images_in_memory(kind == "multi-label")
        stages |= {(kind, name): stage_of(overrides, split) for name, overrides in contenders.items()}
    took = interleaved_medians({key: stage.advance for key, stage in stages.items()}, rounds)
    return stages, took


@pytest.mark.parametrize("kind", CONTENDERS)
def test_methods(kind, steps, benchmark, record):
    """What `Stage.advance` does: images read, outliers chosen, forward, loss and penalty, backward, optimizer."""
    stages, took = ({name: found[kind, name] for name in CONTENDERS[kind]} for found in steps)
    options = stages["oe"].config.optimizer
    record(
        Row(
            room="step",
            case=f"methods, {kind}: ResNet-18 of width 16, {CLASSES} classes",
            shape=(options.batch_size + options.outlier_batch_size, 3, SIDE, SIDE),
            dtype="float32",
            milliseconds=took,
            megabytes={name: peak_of_step(stage) for name, stage in stages.items()},
            error={},
            base="oe",
        )
    )
    for name, stage in stages.items():
        means = stage.means()
        for side in ("selected_in", "selected_out"):
            assert 0.35 < means.get(side, 0.5) < 0.65, (name, side)
        # A twentieth of the step at most: what is compared are methods, not how images are read.
        assert interleaved_medians({"read": stage.next_batch}, 5)["read"] < 0.05 * took[name], name
    benchmark.pedantic(stages["oe"].advance, rounds=1)
