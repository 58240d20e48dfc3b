"""head=fused: the steps of head=full without logits, for the models and losses that it is right for."""

import copy

import pytest
import torch
from test_training import silent
from torch import nn

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, load_config
from oodkern.data import DataConfig, build_split
from oodkern.losses import ClassificationLoss, EnergyLoss, OutlierExposureLoss
from oodkern.methods import Objective
from oodkern.models import SmallCNN
from oodkern.training import start, train
from oodkern.training.files import load_checkpoint, read_json_lines
from oodkern.training.fused import check_fused_head
from oodkern.training.stage import Stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def several():
    return build_split(DataConfig("digits-multilabel"))


class Foreign(nn.Module):
    """Speaks no protocol: its features are found by a hook. `after` is what becomes of the head's output."""

    def __init__(self, classes, after=None, channels=1):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout())
        self.fc, self.after = nn.LazyLinear(classes), after

    def forward(self, images):
        logits = self.fc(self.body(images))
        return logits if self.after is None else self.after(logits)


def classifier_of(kind, split, **options):
    torch.manual_seed(0)
    channels, classes = split.train.shape[0], len(split.classes)
    if kind == "protocol":
        return Classifier(SmallCNN(channels, classes, 8, dropout=0.2), mean=[0.3], std=[0.4])
    model = Foreign(classes, channels=channels, **options).eval()
    model(split.train.images(torch.arange(2)))  # makes the head
    return Classifier(model)


def stage_of(split, config, loss, kind="protocol"):
    stage = Stage("method", config, split, classifier_of(kind, split), Objective(loss), True, CPU)
    torch.manual_seed(1)
    return stage


def losses(multi_label):
    margins = (-12.0, -8.0) if multi_label else (-3.0, -1.0)
    return {
        "ce": ClassificationLoss(multi_label=multi_label),
        "oe": OutlierExposureLoss(multi_label=multi_label),
        "energy": EnergyLoss(margin_in=margins[0], margin_out=margins[1], multi_label=multi_label),
    }


@pytest.mark.parametrize(
    ("kind", "forward"),
    [("protocol", "split_forward=false"), ("protocol", "split_forward=true"), ("hook", "split_forward=false")],
)
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", ["ce", "oe", "energy"])
def test_steps_are_those_of_the_full_head(digits, several, short, name, multi_label, forward, kind):
    """Losses, parts, weights, running statistics, and the random numbers that were used."""
    split, found = several if multi_label else digits, []
    for head in ("full", "fused"):
        loss = losses(multi_label)[name]
        stage = stage_of(split, short(f"head={head}", forward), loss, kind)
        parts = [stage.advance() for _ in range(3)]
        found.append((parts, stage.model.state_dict(), torch.get_rng_state()))
    (full, weights, state), (fused, others, other_state) = found
    assert torch.equal(state, other_state)
    for one, other in zip(fused, full, strict=True):
        del one["seconds"], other["seconds"]
        assert one == pytest.approx(other, rel=2e-4, abs=1e-6)
    for key, one in weights.items():
        torch.testing.assert_close(others[key], one, rtol=1e-3, atol=1e-5, msg=key)


def test_a_loss_that_is_not_separable_gets_both_parts_at_once(digits, short):
    class Paired(EnergyLoss):
        separable = False

    found = []
    for head in ("full", "fused"):
        stage = stage_of(digits, short(f"head={head}", "split_forward=true"), Paired(margin_in=-3, margin_out=-1))
        parts = stage.advance()
        del parts["seconds"]
        found.append(parts)
    assert found[1] == pytest.approx(found[0], rel=2e-4)


@pytest.mark.parametrize("kind", ["protocol", "hook"])
def test_no_logits_are_formed(digits, short, kind):
    stage = stage_of(digits, short("head=fused"), losses(False)["energy"], kind)
    rows = []
    stage.model.head.register_forward_hook(lambda head, arguments, logits: rows.append(len(logits)))
    stage.advance()
    assert sum(rows) == 0
    assert len(rows) == (kind == "hook")


@pytest.mark.parametrize(
    ("precision", "forward"),
    [("bf16", "split_forward=false"), ("bf16", "split_forward=true"), ("fp16", "split_forward=false")],
)
def test_in_16_bits(digits, short, precision, forward):
    """Features and head are cast by autocast; nothing is scaled otherwise than with logits."""
    found = []
    for head in ("full", "fused"):
        config = short(f"head={head}", f"precision={precision}", "optimizer.lr=0.1", forward)
        stage = stage_of(digits, config, losses(False)["energy"])
        found.append([stage.advance() for _ in range(10)])
    full, fused = ([parts["loss"] for parts in one] for one in found)
    assert fused[0] == pytest.approx(full[0], rel=0.02)
    assert sum(fused[-3:]) < 0.9 * sum(fused[:3])
    first = [one[0]["gradient_norm"] for one in found if "gradient_norm" in one[0]]
    assert len(first) < 2 or first[1] == pytest.approx(first[0], rel=0.05)


OPTIONS = ("model.width=8", "epochs=1", "pretrain.epochs=1", "model.dropout=0.2")


@pytest.mark.parametrize("data", ["digits", "digits-multilabel"])
def test_a_run_is_judged_as_with_the_full_head(short, data):
    runs, lines = [], []
    for head in ("full", "fused"):
        config = short(f"head={head}", f"name={head}", f"data.name={data}", *OPTIONS)
        runs.append(train(config, log=lines.append, report=False))
    assert sum("fused head:" in line for line in lines) == 1
    full, fused = runs
    torch.testing.assert_close(fused.method.scores, full.method.scores, rtol=1e-2, atol=1e-2)
    assert fused.decided["margin_in"] == pytest.approx(full.decided["margin_in"], rel=1e-3)


def test_resuming_is_bit_for_bit_the_same(short, monkeypatch):
    options = ("head=fused", *OPTIONS, "checkpoint_steps=1")
    whole = train(short("name=whole", *options), log=silent, report=False)
    advance = Stage.advance

    def stop(self):
        if self.kind == "method" and self.step == 4:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Stage, "advance", stop)
    config = short("name=parts", *options)
    with pytest.raises(KeyboardInterrupt):
        train(config, log=silent, report=False)
    monkeypatch.undo()
    parts = train(config, log=silent, resume=True, report=False)
    one, other = (load_checkpoint(run.folder / "last.ckpt")["model"] for run in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda z: z.log_softmax(-1), r"needs a model whose logits are the output of fc; they differ .* by up to"),
        (lambda z: z[:, :4], r"expects features \[N, D\] and logits \[N, 6\], got \[16, 288\] and \[16, 4\]"),
        (lambda z: z * 1.01, "needs a model whose logits"),
    ],
)
def test_a_head_whose_output_is_not_the_logits(digits, after, message):
    classifier = classifier_of("hook", digits)
    images = digits.train.images(torch.arange(16))
    check_fused_head(classifier, losses(False).values(), images)
    classifier.model.after = after
    with pytest.raises(ConfigError, match=f"^head: fused {message}.*; use full$"):
        check_fused_head(classifier, losses(False).values(), images)


def test_a_head_that_cannot_be_passed_by(digits):
    classifier = classifier_of("hook", digits)
    classifier.model.after = lambda z: z + classifier.model.fc(classifier.model.body(torch.rand(16, 1, 8, 8)))
    with pytest.raises(ConfigError, match=r"head: fused cannot take the features of fc.*called 2 times"):
        check_fused_head(classifier, [], digits.train.images(torch.arange(16)))


def test_a_loss_of_logits_alone(digits):
    with pytest.raises(ConfigError, match="head: fused needs a loss with from_features, CrossEntropyLoss has none"):
        check_fused_head(classifier_of("hook", digits), [nn.CrossEntropyLoss()], digits.train.images(torch.arange(2)))


@pytest.mark.parametrize("kind", ["protocol", "hook"])
def test_the_check_leaves_no_trace(digits, kind):
    classifier = classifier_of(kind, digits).train()
    before, state = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()
    check_fused_head(classifier, [], digits.train.images(torch.arange(16)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())
    assert all(module.training for module in classifier.modules())


def test_found_out_before_training(short, monkeypatch):
    class Other(SmallCNN):
        def forward(self, images):
            return super().forward(images) * 2

    monkeypatch.setattr(start, "build_model", lambda options, channels, classes: Other(channels, classes, 8))
    config = short("head=fused")
    with pytest.raises(ConfigError, match="head: fused needs a model whose logits are the output of fc"):
        train(config, log=silent, report=False)
    assert not read_json_lines(config.folder / "metrics.jsonl")


def test_the_key():
    assert load_config().head == "full"
    with pytest.raises(ConfigError, match="head: expected one of full, fused, got 'fuse'"):
        load_config(None, ["head=fuse"])
