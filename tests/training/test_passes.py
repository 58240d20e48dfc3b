"""Gradients of a step that is made of several passes, on one process or on two, against those of one pass."""

import contextlib
import functools

import processes
import pytest
import torch
from stages import DRAWN, split_of, stage_of
from torch import nn

from oodkern.classifier import Classifier
from oodkern.models import ImageClassifier
from oodkern.processes import ALONE, Processes, whole

# Of every method what its step depends on; small margins of the energies decide what GReg selects.
METHODS = {
    "ce": (),
    "oe": (),
    "energy": (),
    "greg": ("loss.chunk=16",),
    "gregplus": ("loss.chunk=16",),
    "gregplus, one batch of candidates for two steps": ("loss.sample_every=2",),
    "separation": (),
    "separation, projection": ("loss.separation=projection", "loss.rank=3"),
    "oal": (*DRAWN, "loss.teacher_outputs=online"),
    "oal, cached": (*DRAWN, "loss.teacher_outputs=cached", "loss.transfer=mlp"),
    "oal, maximum likelihood": (*DRAWN, "loss.club_mode=mle"),
    "oal, InfoNCE": (*DRAWN, "loss.contrast=infonce"),
    "edge": ("loss.gap_start=0",),
    "edge, by frequency": ("loss.gap_start=0", "loss.tail=frequency"),
    "edge, before the gap": ("loss.gap_start=1",),
    "energy, multi-label": ("data.name=digits-multilabel",),
    "greg, multi-label": ("data.name=digits-multilabel", "loss.chunk=16"),
}
FUSED = {"ce", "oe", "energy", "greg", "gregplus", "separation", "edge"}
# Shares that no number of passes or processes divides.
ODD = ("optimizer.batch_size=33", "optimizer.outlier_batch_size=65", "optimizer.lr=0.01", "epochs=2")


class Block(nn.Module):
    def __init__(self, channels, width, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, padding=1), norm

    def forward(self, images):
        return nn.functional.gelu(self.norm(self.conv(images)))


def network(split, kind):
    """Without BatchNorm, or with it, of statistics that are not those of a batch; with random numbers."""
    torch.manual_seed(3)
    channels, width = split.train.shape[0], 6

    def norm():
        if kind == "group":
            return nn.GroupNorm(2, width)
        if kind == "dropout":
            return nn.Dropout(0.3)
        found = nn.BatchNorm2d(width)
        found.running_mean.uniform_(-0.2, 0.2)
        found.running_var.uniform_(0.5, 2)
        return found

    blocks = nn.Sequential(Block(channels, width, norm()), nn.AvgPool2d(2), Block(width, width, norm()))
    model = ImageClassifier(blocks, width, len(split.classes))
    classifier = Classifier(model, mean=[0.3] * channels, std=[0.4] * channels)
    return classifier.to(torch.get_default_dtype())


@contextlib.contextmanager
def float64():
    """In which models and losses are made: what is left between two ways of adding is then 1e-12 and not a tolerance
    that wrong gradients could hide in."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def stage_by(name, *overrides, kind="group", of=ALONE):
    method = name.partition(",")[0]
    overrides = (*ODD, *METHODS[name], *overrides)
    multi = method == "edge" or "data.name=digits-multilabel" in overrides
    split = split_of("digits-multilabel" if multi else "digits")
    norm = "batch_norm=frozen" if kind == "frozen" else "batch_norm=batch"
    return stage_of(method, norm, *overrides, model=network(split, kind), split=split, processes=of)


def together_alive(gradients, passes, whole):
    """The step of coupled rows with the graphs of all passes, each made once."""
    joined = [
        gradients.joined([form(one.images) for one in passes], passes) for form in (gradients.replica, gradients.given)
    ]
    value, parts = gradients.objective.loss_of(gradients.replica.model, (*joined[0], *joined[1]), whole)
    value.backward()
    return {"loss": value.detach(), **parts}


@float64()
def two_steps(name, *overrides, kind="group", of=ALONE, alive=False):
    """Losses and parts of two steps, the second one's gradients, and what parameters and buffers are then."""
    stage = stage_by(name, *overrides, kind=kind, of=of)
    if alive:
        stage.gradients.together = functools.partial(together_alive, stage.gradients)
    parts = [stage.advance() for _ in range(2)]
    for one in parts:
        one.pop("seconds")
    trained = {f"model.{name}": one for name, one in stage.replica.model.named_parameters()}
    trained |= {f"loss.{name}": one for name, one in stage.objective.loss.named_parameters()}
    gradients = {name: whole(one.grad).clone() for name, one in trained.items() if one.grad is not None}
    stage.replica.export()
    parameters = {f"model.{name}": one for name, one in stage.model.named_parameters()}
    parameters |= {f"loss.{name}": one for name, one in stage.objective.loss.named_parameters()}
    buffers = {name: one.detach().clone() for name, one in stage.model.named_buffers()}
    buffers |= {name: one for name, one in stage.objective.loss.state_dict().items() if isinstance(one, torch.Tensor)}
    return parts, gradients, {name: one.detach().clone() for name, one in parameters.items()}, buffers


def assert_equal(found, expected, tolerance=1e-9):
    """Off by a share of each tensor's norm, or of a hundredth of all of them."""
    for one, other in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
    for values, others in zip(found[1:], expected[1:], strict=True):
        assert values.keys() == others.keys()
        whole = torch.stack([one.double().norm() for one in others.values()]).norm() if others else 0.0
        for name, other in others.items():
            off = (values[name].double() - other.double()).norm() / torch.maximum(other.double().norm(), whole / 100)
            assert off < tolerance, (name, float(off))


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_is_the_plain_step(name):
    plain = two_steps(name)
    assert any(one.abs().max() > 0 for one in plain[1].values())
    assert_equal(two_steps(name, "accumulate=3"), plain)
    assert_equal(two_steps(name, "accumulate=2", "split_forward=true", kind="group"), plain)
    if name in FUSED:
        assert_equal(two_steps(name, "accumulate=4", "head=fused"), plain)


@pytest.mark.parametrize("kind", ["group", "batch", "frozen", "dropout"])
@pytest.mark.parametrize("name", ["energy", "greg", "gregplus", "edge", "oal"])
def test_checkpointed_activations_are_the_plain_step(name, kind):
    """BatchNorm takes part with its running statistics, which a block that is computed again moves but once."""
    assert_equal(two_steps(name, "checkpoint_activations=true", kind=kind), two_steps(name, kind=kind))


@pytest.mark.parametrize("kind", ["batch", "dropout"])
@pytest.mark.parametrize("name", ["edge", "oal"])
def test_rows_that_are_made_twice_are_the_same(name, kind):
    """Two passes of a coupled loss: of the same random numbers, and moving running statistics once.

    The same passes with both graphs alive are what the gradient is compared with.
    """
    expected = two_steps(name, "accumulate=2", kind=kind, alive=True)
    assert_equal(two_steps(name, "accumulate=2", kind=kind), expected)


@pytest.mark.parametrize("name", ["energy", "greg", "edge", "oal"])
def test_accumulation_with_frozen_batch_norm(name):
    assert_equal(two_steps(name, "accumulate=3", kind="frozen"), two_steps(name, kind="frozen"))


def of_process(cases):
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return [two_steps(name, *keys(more), kind=kind_of(more), of=of) for name, more in cases]


def keys(more):
    return [one for one in more if not one.startswith("kind=")]


def kind_of(more):
    return next((one.partition("=")[2] for one in more if one.startswith("kind=")), "group")


HEAD = ("head=fused", "parallel_head=true")
PARALLEL = ("ce", "oe", "energy", "separation", "edge", "energy, multi-label")
SHARD = ("parallel=fully_shard",)
SCATTERED = [
    *((name, ()) for name in METHODS),
    *((name, ("head=fused", "accumulate=2")) for name in sorted(FUSED)),
    *((name, ("accumulate=2", "split_forward=true")) for name in ("energy", "greg", "edge", "oal")),
    *((name, HEAD) for name in PARALLEL),
    *((name, (*HEAD, "accumulate=2", "optimizer.clip_norm=0.01")) for name in ("energy", "edge")),
    *((name, SHARD) for name in METHODS),
    *((name, (*SHARD, "head=fused", "accumulate=2", "optimizer.clip_norm=0.01")) for name in ("energy", "edge")),
    *((name, (*SHARD, "accumulate=2", "checkpoint_activations=true")) for name in ("energy", "greg", "edge", "oal")),
    ("gregplus", (*SHARD, "head=fused", "split_forward=true")),
    # Processes that forward other numbers of images for the penalty, and for the choice of outliers.
    ("greg", (*SHARD, "loss.chunk=1")),
    ("greg", (*SHARD, "loss.chunk=1", "loss.margins=fixed", "loss.margin_in=-2.2", "loss.margin_out=50")),
    ("gregplus", (*SHARD, "loss.candidates=131")),
    *((name, (*more, "kind=frozen")) for name in ("energy", "greg", "edge", "oal") for more in ((), SHARD)),
]


@pytest.fixture(scope="module")
def scattered():
    return processes.run(of_process, 2, SCATTERED)


@pytest.mark.parametrize("i", range(len(SCATTERED)), ids=[", ".join((name, *more)) for name, more in SCATTERED])
def test_two_processes_are_one(i, scattered):
    name, more = SCATTERED[i]
    kept = [one for one in more if one == "head=fused" or one.startswith(("optimizer", "loss"))]
    expected = two_steps(name, *kept, kind=kind_of(more))
    first, second = (one[i] for one in scattered)
    assert_equal(first, expected)
    assert_equal(second, first, tolerance=1e-12)
