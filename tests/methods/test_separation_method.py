"""`separation` in the trainer: the step in float64, its stages, its projection, its score."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from stages import batch_of, check_step, energies, outlier_exposure, smooth, split_of, stage_of

from oodkern.classifier import Output
from oodkern.methods import METHODS
from oodkern.methods.separation import SeparationOptions


def by_hand(stage, basis=None, on=True):
    options, decided = stage.config.loss, stage.objective.loss.outlier_loss
    model, images, target, outliers = batch_of(stage)
    logits, features = model.outputs(torch.cat([images, outliers]))
    n = len(images)
    loss = F.cross_entropy(logits[:n], target)
    if options.outlier_loss == "oe":
        loss = loss + (options.weight or 0.5) * outlier_exposure(logits[n:]).mean()
    else:
        E = energies(logits)
        loss = loss + (options.weight or 0.1) * (E[:n] - decided.margin_in).relu().square().mean()
        loss = loss + (options.weight or 0.1) * (decided.margin_out - E[n:]).relu().square().mean()
    if not on:
        return loss, model
    weight = F.normalize(model.head.weight.detach(), dim=1)
    x = F.normalize(features, dim=1)
    loss = loss - options.alpha * (x[:n] * weight[target]).sum(1).mean()
    if options.separation == "projection":
        return loss + options.beta * (x[n:] @ basis.double()).square().sum(1).mean(), model
    cosines = (x[n:] @ weight.T).abs()
    summed = options.sep_reduction in ("auto", "sum")
    return loss + options.beta * (cosines.sum(1) if summed else cosines.mean(1)).mean(), model


@pytest.mark.parametrize("network", ["smooth", "small_cnn"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("loss.sep_reduction=mean", "loss.alpha=0.3", "loss.beta=2", "loss.weight=0.7"),
        ("loss.outlier_loss=energy",),
        ("loss.outlier_loss=energy", "loss.weight=0.3"),
        ("loss.outlier_loss=energy", "loss.margins=fixed", "loss.margin_in=-9", "loss.margin_out=-1"),
    ],
)
def test_the_step(network, options):
    stage = stage_of("separation", *options, model=smooth(split_of()) if network == "smooth" else None)
    if "loss.margin_in=-9" in options:
        loss = stage.objective.loss.outlier_loss
        assert (loss.margin_in, loss.margin_out) == (-9, -1)
    parts = check_step(stage, *by_hand(stage))
    assert {"cluster", "separation"} <= parts.keys()


def test_stage_two_begins_at_start():
    stage = stage_of("separation", "loss.start=0.5")
    assert stage.steps == 4
    for step in range(4):
        parts = check_step(stage, *by_hand(stage, on=step >= 2))
        assert ("separation" in parts, "cluster" in parts) == (step >= 2, step >= 2)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_projection_follows_the_weights(rank):
    """Made of the weights at every other step, by a singular value decomposition, and kept between."""
    options = ("loss.separation=projection", f"loss.rank={rank}", "loss.refresh=2", "optimizer.lr=0.3")
    stage = stage_of("separation", *options, "loss.beta=3")
    kept = []
    for step in range(4):
        if step % 2 == 0:
            weight = stage.model.head.weight.detach().double()
            kept.append(torch.linalg.svd(weight)[2][: rank or len(weight)].T)
        check_step(stage, *by_hand(stage, kept[-1]))
    moved = kept[0] @ kept[0].T - kept[1] @ kept[1].T
    assert moved.norm() > 1e-3, "the weights moved"


@pytest.mark.parametrize("forward", ["false", "true"])
def test_the_projection_counts_steps(forward):
    """And not the passes of a step, of which split_forward makes two."""
    options = ("loss.separation=projection", "loss.rank=2", "loss.refresh=2", "optimizer.lr=0.3", "epochs=2")
    stage, made = stage_of("separation", *options, f"split_forward={forward}", "loss.beta=3"), []
    for _ in range(6):
        stage.advance()
        made.append(stage.objective.loss.basis.clone())
    assert [torch.equal(one, other) for one, other in pairwise(made)] == [True, False] * 2 + [True]


@pytest.mark.parametrize("options", [(), ("loss.start=0.4",), ("loss.separation=projection", "loss.refresh=2")])
@pytest.mark.parametrize("forward", ["false", "true"])
def test_fused_head(options, forward):
    found = []
    for head in ("full", "fused"):
        stage = stage_of("separation", *options, f"head={head}", f"split_forward={forward}")
        parts = [stage.advance() for _ in range(4)]
        for one in parts:
            del one["seconds"]
        found.append((parts, list(stage.model.parameters())))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert other == pytest.approx(one, rel=5e-4, abs=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5)


def test_split_forward_has_the_gradients_of_the_joint_one():
    found = []
    for forward in ("false", "true"):
        stage = stage_of("separation", f"split_forward={forward}", model=smooth(split_of()))
        parts = stage.advance()
        del parts["seconds"]
        found.append((torch.cat([one.grad.flatten() for one in stage.parameters]), parts))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_score(reduction):
    """-(max softmax + mean or sum over classes of |cos(x, w_c)|), larger = more OOD."""
    method = METHODS["separation"](SeparationOptions(score_reduction=reduction))
    logits, features, weight = torch.randn(9, 6) * 3, torch.randn(9, 16), torch.randn(6, 16)
    cosines = F.cosine_similarity(features.double()[:, None], weight.double()[None], dim=-1).abs()
    aligned = cosines.sum(1) if reduction == "sum" else cosines.mean(1)
    expected = -(logits.double().softmax(-1).amax(-1) + aligned)
    torch.testing.assert_close(method.score(Output(logits, features), weight), expected.float(), rtol=1e-5, atol=1e-6)
    assert method.score_name == "msp+alignment"
    away = features - features @ torch.linalg.pinv(weight) @ weight  # off the span of the weights
    assert (method.score(Output(logits, away), weight) > method.score(Output(logits, features), weight)).all()


def test_margins_are_decided_for_the_energy_loss_alone():
    known, unknown = torch.randn(50, 6) * 4, torch.randn(40, 6)
    assert METHODS["separation"](SeparationOptions()).decide(known, unknown) == {}
    method = METHODS["separation"](SeparationOptions(outlier_loss="energy", weight=0.1))
    decided = method.decide(known, unknown)
    assert decided["margin_in"] == pytest.approx(float(energies(known).quantile(0.25)), rel=1e-5)
    assert method.build_loss(decided).outlier_loss.margin_in == decided["margin_in"]
    assert method.describe(decided).startswith("margins (auto): ID energies under ")
