"""The stage of a method as the trainer forms it, without a run around it; and terms of losses written out."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from oodkern.classifier import Classifier
from oodkern.config import load_config
from oodkern.data import DataConfig, build_split
from oodkern.methods import METHODS
from oodkern.processes import ALONE
from oodkern.training.evaluation import logits_of
from oodkern.training.stage import Stage
from oodkern.training.start import build_classifier, setting_of

CPU = torch.device("cpu")
# Of each method, what makes a step small.
FEW = ("epochs=1", "data.limit=320", "model.width=4", "optimizer.outlier_batch_size=128", "batch_norm=batch")
DRAWN = ("loss.draws=20", "loss.keep=8", "loss.rounds=1")  # more outliers than a batch has images


@functools.cache
def split_of(name="digits", limit=320, augmentation="auto"):
    return build_split(DataConfig(name, limit=limit, augmentation=augmentation, outlier_augmentation=augmentation))


def stage_of(method, *overrides, model=None, decided=None, split=None, processes=ALONE):
    """A Stage on a starting model (an untrained one unless given), and with margins found on it unless given."""
    config = load_config(None, [f"method={method}", *FEW, *overrides])
    if split is None:
        split = split_of(config.data.name, config.data.limit, config.data.augmentation)
    torch.manual_seed(0)
    classifier = build_classifier(config, split) if model is None else copy.deepcopy(model)
    binding = METHODS[method](config.loss, split.multi_label)
    if decided is None:
        decided = binding.decide(*(logits_of(classifier, part) for part in (split.train, split.outliers)))
    setting = setting_of(config, split, copy.deepcopy(classifier), CPU)
    objective = binding.objective(decided, setting)
    stage = Stage("method", config, split, classifier, objective, binding.uses_outliers, CPU, processes)
    torch.manual_seed(1)
    return stage


def smooth(split):
    """A network without BatchNorm, dropout or kinks, whose rows do not see one another."""
    torch.manual_seed(3)
    channels, classes = split.train.shape[0], len(split.classes)
    side = split.train.shape[1] - 2
    network = nn.Sequential(
        nn.Conv2d(channels, 6, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(6 * side * side, 12),
        nn.GELU(),
        nn.Linear(12, classes),
    )
    return Classifier(network, "5", mean=[0.3] * channels, std=[0.4] * channels)


def batch_of(stage):
    """What the next step is made of, in float64: model, images, target, outliers. The stage stays as it is."""
    twin = copy.copy(stage)
    twin._id_stream = twin._outlier_stream = twin._candidates = None
    images, target, outliers = twin.next_batch()
    model = copy.deepcopy(stage.model).double().train()
    return model, images.double(), target, None if outliers is None else outliers.double()


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def check_step(stage, loss, model, tolerance=1e-3):
    """One step of the stage has the loss and the gradients of the float64 `loss` of a copy of its model.

    A gradient is off by its distance as a share of its norm, and where it is small of a tenth of all gradients' norm.
    That is 1e-6 but for the ties of max-pooling, which fall otherwise in float64: 3e-4 for plain PyTorch in float32.
    """
    expected = gradients_of(loss, model)
    whole = torch.cat([one.flatten() for one in expected]).norm()
    parts = stage.advance()
    torch.testing.assert_close(torch.tensor(parts["loss"]).double(), loss.detach(), rtol=1e-5, atol=1e-6)
    for (name, one), other in zip(stage.model.named_parameters(), expected, strict=True):
        found = torch.zeros_like(one) if one.grad is None else one.grad
        off = float((found.double() - other).norm() / torch.maximum(other.norm(), whole / 10))
        assert off < tolerance, (name, off)
    return parts


def energies(logits, temperature=1.0):
    return -temperature * torch.logsumexp(logits / temperature, -1)


def outlier_exposure(logits):
    """Cross-entropy to the uniform distribution, each row."""
    return -F.log_softmax(logits, -1).mean(-1)
