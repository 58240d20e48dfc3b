"""One step: joint and split forward, precision, schedule, clipping."""

import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from oodkern.losses import ClassificationLoss, EnergyLoss, OutlierExposureLoss
from oodkern.methods import Objective
from oodkern.models import SmallCNN
from oodkern.schema import ScheduleConfig
from oodkern.training import NotFinite
from oodkern.training.stage import Stage, rate_at

CPU = torch.device("cpu")


def stage_of(digits, config, loss=None, model=None, outliers=True):
    torch.manual_seed(0)
    model = model or SmallCNN(1, 6, 8)
    loss = loss or EnergyLoss(margin_in=-3, margin_out=-1)
    return Stage("method", config, digits, model, Objective(loss), outliers, CPU)


def without_batch_norm():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 6))


def gradients(stage):
    return [parameter.grad.clone() for parameter in stage.parameters]


@pytest.mark.parametrize("loss", [EnergyLoss(margin_in=-3, margin_out=-1), OutlierExposureLoss(), ClassificationLoss()])
def test_split_forward_has_the_gradients_of_the_joint_one(digits, short, loss):
    found = []
    for overrides in ([], ["split_forward=true"]):
        torch.manual_seed(1)
        stage = stage_of(digits, short(*overrides), loss, without_batch_norm())
        parts = stage.advance()
        found.append((gradients(stage), {name: value for name, value in parts.items() if name != "seconds"}))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


def test_a_loss_that_is_not_separable_gets_both_parts_at_once(digits, short):
    class Paired(EnergyLoss):
        separable = False

        def forward(self, logits, target, logits_ood=None, **options):
            value, parts = super().forward(logits, target, logits_ood, **options)
            return value + (logits_ood.mean() - logits.mean()).square(), parts

    found = []
    for overrides in ([], ["split_forward=true"]):
        torch.manual_seed(1)
        stage = stage_of(digits, short(*overrides), Paired(margin_in=-3, margin_out=-1), without_batch_norm())
        stage.advance()
        found.append(gradients(stage))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_split_forward_changes_batch_statistics(digits, short):
    joint, split = (stage_of(digits, short(*overrides)) for overrides in ([], ["split_forward=true"]))
    joint.advance()
    split.advance()
    assert not torch.allclose(gradients(joint)[0], gradients(split)[0], rtol=1e-2)


def peak_of_saved_tensors(stage):
    """The most bytes that autograd holds at any time of a step, counted by storage."""
    alive, peak = {}, 0

    def pack(tensor):
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
        peak = max(peak, sum(alive.values()))
        return Saved(tensor)

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        stage.advance()
    return peak


def test_split_forward_holds_less(digits, short):
    """64 ID images and 128 outliers: two thirds of the activations at a time, not all."""
    joint, split = (
        peak_of_saved_tensors(stage_of(digits, short(*overrides), model=SmallCNN(1, 6, 32)))
        for overrides in ([], ["split_forward=true"])
    )
    assert split < 0.75 * joint


def test_augmentation_reaches_each_stream(digits, short):
    split = replace(digits, augmentation="none", outlier_augmentation="none")
    plain = stage_of(split, short()).next_batch()
    for name, changed in (("augmentation", 0), ("outlier_augmentation", 2)):
        found = stage_of(replace(split, **{name: "crop"}), short()).next_batch()
        assert torch.equal(found[1], plain[1])
        assert [torch.equal(one, other) for one, other in zip(found, plain, strict=True)].index(False) == changed


def test_the_joint_forward_is_one_forward(digits, short):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.sizes = SmallCNN(1, 6, 4), []

        def forward(self, images):
            self.sizes.append(len(images))
            return self.inner(images)

    model = Counting()
    stage_of(digits, short(), model=model).advance()
    assert model.sizes == [192]
    stage_of(digits, short("split_forward=true"), model=model).advance()
    assert model.sizes == [192, 64, 128]
    stage_of(digits, short(), model=model, loss=ClassificationLoss(), outliers=False).advance()
    assert model.sizes[3:] == [64]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision(digits, short, precision, dtype):
    seen = []

    class Watching(EnergyLoss):
        def forward(self, logits, *arguments, **options):
            seen.append(logits.dtype)
            value, parts = super().forward(logits, *arguments, **options)
            seen.append(value.dtype)
            return value, parts

    stage = stage_of(digits, short(f"precision={precision}", "optimizer.lr=0.1"), Watching(margin_in=-3, margin_out=-1))
    before = [parameter.clone() for parameter in stage.parameters]
    losses = [stage.advance()["loss"] for _ in range(30)]
    assert seen[:2] == [dtype, torch.float32]
    assert all(parameter.dtype == torch.float32 for parameter in stage.parameters)
    assert any(not torch.equal(one, other) for one, other in zip(before, stage.parameters, strict=True))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert stage.scaler.is_enabled() == (precision == "fp16")


def test_float16_gradients_that_overflow_are_left_out(digits, short):
    stage = stage_of(digits, short("precision=fp16"))
    stage.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.clone() for parameter in stage.parameters]
    parts = stage.advance()
    assert all(torch.equal(one, other) for one, other in zip(before, stage.parameters, strict=True))
    assert "gradient_norm" not in parts
    assert stage.scaler.get_scale() == 2.0**39
    assert stage.step == 1


def test_float16_gradients_that_always_overflow_stop_the_run(digits, short):
    class Steep(EnergyLoss):
        def forward(self, *arguments, **options):
            value, parts = super().forward(*arguments, **options)
            return value + (value - value.detach()).sqrt(), parts

    stage = stage_of(digits, short("precision=fp16"), Steep(margin_in=-3, margin_out=-1))

    def forty_steps():
        for _ in range(40):
            stage.advance()

    with pytest.raises(NotFinite, match="the gradient's norm is"):
        forty_steps()
    assert 10 < stage.step < 25  # from 2^16 down to a scale below 1


def test_clipping(digits, short):
    torch.manual_seed(0)
    free = stage_of(digits, short("optimizer.momentum=0", "optimizer.weight_decay=0"))
    norm = free.advance()["gradient_norm"]
    expected = torch.cat([grad.flatten() for grad in gradients(free)]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-5)
    clipped = stage_of(digits, short(f"optimizer.clip_norm={norm / 4}"))
    assert clipped.advance()["gradient_norm"] == pytest.approx(norm, rel=1e-6)
    assert torch.cat([grad.flatten() for grad in gradients(clipped)]).norm() == pytest.approx(norm / 4, rel=1e-4)
    for one, other in zip(gradients(free), gradients(clipped), strict=True):
        torch.testing.assert_close(one / 4, other, rtol=1e-4, atol=1e-8)


def test_clipping_sees_the_gradient_and_not_its_scaled_copy(digits, short):
    """The scaler multiplies float16 gradients by 65,536."""
    plain, halves = (stage_of(digits, short(f"precision={precision}")) for precision in ("fp32", "fp16"))
    expected = plain.advance()["gradient_norm"]
    assert halves.advance()["gradient_norm"] == pytest.approx(expected, rel=0.05)
    clipped = stage_of(digits, short("precision=fp16", f"optimizer.clip_norm={expected / 4}"))
    clipped.advance()
    assert torch.cat([grad.flatten() for grad in gradients(clipped)]).norm() == pytest.approx(expected / 4, rel=0.05)


def test_each_stage_has_its_learning_rate(digits, short):
    config = short("optimizer.lr=0.02", "pretrain.lr=0.3", "epochs=1", "pretrain.epochs=3")
    for kind, lr, steps in (("method", 0.02, 10), ("pretrain", 0.3, 30)):
        stage = Stage(kind, config, digits, SmallCNN(1, 6, 4), Objective(ClassificationLoss()), False, CPU)
        stage.advance()
        assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert stage.steps == steps
    assert stage.optimizer.defaults["nesterov"]
    assert not stage_of(digits, short("optimizer.momentum=0")).optimizer.defaults["nesterov"]


def test_means_are_of_the_steps_that_had_the_part(digits, short):
    """A step that float16 left out has no gradient norm, and does not count as one of zero."""
    stage = stage_of(digits, short("precision=fp16"))
    stage.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    norms = [parts["gradient_norm"] for parts in (stage.advance() for _ in range(10)) if "gradient_norm" in parts]
    assert 0 < len(norms) < 10
    assert stage.means()["gradient_norm"] == pytest.approx(sum(norms) / len(norms))


def test_schedules():
    cosine = [rate_at(step, 100, 0, ScheduleConfig()) for step in range(101)]
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[100] == pytest.approx(0)
    assert all(one > other for one, other in pairwise(cosine))
    # The rates of PyTorch's own, step by step.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    known = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for value in cosine[:100]:
        assert value == pytest.approx(known.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        known.step()
    step = ScheduleConfig("step", milestones=[0.5, 0.75], gamma=0.1)
    assert [rate_at(s, 100, 0, step) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rate_at(70, 100, 0, ScheduleConfig("constant")) == 1
    warm = [rate_at(s, 110, 10, ScheduleConfig()) for s in range(11)]
    assert warm == pytest.approx([(s + 1) / 10 for s in range(10)] + [1.0])
    assert rate_at(60, 110, 10, ScheduleConfig()) == pytest.approx(0.5)


def test_the_schedule_reaches_the_optimizer(digits, short):
    stage = stage_of(digits, short("optimizer.lr=0.3", "schedule.warmup=1"))
    rates = []
    while stage.step < stage.steps:
        stage.advance()
        rates.append(stage.optimizer.param_groups[0]["lr"])
    assert stage.steps_per_epoch == 10
    assert rates[:10] == pytest.approx([0.03 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.3)
    assert rates[-1] == pytest.approx(0.15 * (1 + math.cos(math.pi * 0.9)))


def test_adamw(digits, short):
    stage = stage_of(digits, short("optimizer.name=adamw", "optimizer.lr=0.005", "optimizer.weight_decay=0.1"))
    assert isinstance(stage.optimizer, torch.optim.AdamW)
    assert stage.optimizer.defaults["weight_decay"] == 0.1
    losses = [stage.advance()["loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


def test_parameters_of_the_loss_are_trained(digits, short):
    """An estimator inside a loss reaches the optimizer by itself."""

    class Learned(EnergyLoss):
        def __init__(self):
            super().__init__(margin_in=-3, margin_out=-1)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, *arguments, **options):
            value, parts = super().forward(*arguments, **options)
            return value * self.scale, parts

    loss = Learned()
    stage_of(digits, short(), loss).advance()
    assert loss.scale != 2.0


def test_epoch_means(digits, short):
    stage = stage_of(digits, short())
    seen = [stage.advance() for _ in range(10)]
    assert stage.at_epoch_end
    means = stage.means()
    assert means["loss"] == pytest.approx(sum(parts["loss"] for parts in seen) / 10)
    assert means["images_per_second"] == pytest.approx(192 * 10 / sum(parts["seconds"] for parts in seen))
    assert not stage.totals
