"""`greg` in the trainer: a step against plain autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from stages import batch_of, check_step, energies, smooth, split_of, stage_of

from oodkern.classifier import Output
from oodkern.cli import main
from oodkern.methods import METHODS
from oodkern.methods.greg import Energies


def by_hand(stage, decided):
    """CE + alpha hinges^2 + beta penalty of the samples that satisfy their margin, and the shares of these."""
    options, multi_label = stage.config.loss, stage.config.multi_label
    model, images, target, outliers = batch_of(stage)
    both, n, m = torch.cat([images, outliers]), len(images), len(outliers)

    def score(logits):
        return -F.softplus(logits).sum(-1) if multi_label else energies(logits, options.temperature)

    logits = model(both)
    S, is_ood = score(logits), torch.arange(n + m) >= n
    hinges = (S[:n] - decided["margin_in"]).relu().square().mean()
    hinges = hinges + (decided["margin_out"] - S[n:]).relu().square().mean()
    if multi_label:
        own = F.binary_cross_entropy_with_logits(logits[:n], target.double())
    else:
        own = F.cross_entropy(logits[:n], target)
    selected = torch.where(is_ood, decided["margin_out"] <= S, decided["margin_in"] >= S)
    model.eval()  # BatchNorm on its running statistics, which the forward pass above has moved
    x = model.normalize(both)[selected].requires_grad_()
    (slope,) = torch.autograd.grad(score(model.model(x)).sum(), x, create_graph=True)
    scale = n + m if options.gradient_scale == "code" else 1
    weight = torch.where(is_ood, 1 / m, 1 / n)[selected].double() / scale
    penalty = (weight * slope.flatten(1).square().sum(1).sqrt()).sum()
    shares = [float(selected[:n].double().mean()), float(selected[n:].double().mean())]
    return own + options.alpha * hinges + options.beta * penalty, model, penalty.detach(), shares


HALF = {"margins": "fixed", "id_inside": 0.5, "outliers_inside": 0.5}  # how margins are described, not used


def margins_of(stage):
    """Margins that about half of the ID rows and a third of the outliers satisfy."""
    model, images, _, outliers = batch_of(stage)
    method = stage.objective.method
    known, unknown = (method.energy(model(one)).detach() for one in (images, outliers))
    margin_in, margin_out = float(known.quantile(0.5)), float(unknown.quantile(0.67))
    if margin_in >= margin_out:
        margin_in = margin_out - 1e-3
    return HALF | {"margin_in": margin_in, "margin_out": margin_out}


@pytest.mark.parametrize("network", ["smooth", "small_cnn"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("loss.gradient_scale=paper", "loss.beta=0.5", "loss.temperature=2", "loss.alpha=0.3", "loss.chunk=7"),
        ("data.name=digits-multilabel", "loss.gradient_scale=paper", "optimizer.name=sgd"),
    ],
)
def test_the_step(network, options):
    several = "data.name=digits-multilabel" in options
    model = smooth(split_of("digits-multilabel" if several else "digits")) if network == "smooth" else None
    decided = margins_of(stage_of("greg", *options, model=model))
    stage = stage_of("greg", *options, model=model, decided=decided)
    loss, copied, penalty, shares = by_hand(stage, decided)
    assert all(0 < share < 0.9 for share in shares)
    without = stage_of("greg", *options, "loss.beta=0", model=model, decided=decided)
    without.advance()
    parts = check_step(stage, loss, copied)
    assert [parts["selected_in"], parts["selected_out"]] == pytest.approx(shares)
    assert parts["gradient"] == pytest.approx(float(penalty), rel=1e-4)
    # The penalty is seen in the gradients at all.
    grads = [torch.cat([p.grad.flatten() for p in one.model.parameters()]) for one in (stage, without)]
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[1].norm() / (
        1 if "loss.gradient_scale=paper" in options else 192
    )


def test_buffers_of_the_penalty_stay():
    """The images of the penalty pass BatchNorm by its running statistics, and move them not."""
    stages = [stage_of(method) for method in ("greg", "energy")]
    for stage in stages:
        stage.advance()
    one, other = (dict(stage.model.named_buffers()) for stage in stages)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(module.training for module in stages[0].model.modules())


def gradients(stage):
    return torch.cat([one.grad.flatten() for one in stage.parameters])


@pytest.mark.parametrize("scale", ["code", "paper"])
def test_split_forward_has_the_gradients_of_the_joint_one(scale):
    model = smooth(split_of())
    decided = margins_of(stage_of("greg", model=model))
    found = []
    for forward in ("false", "true"):
        options = (f"split_forward={forward}", f"loss.gradient_scale={scale}", "loss.beta=50")
        stage = stage_of("greg", *options, model=model, decided=decided)
        parts = stage.advance()
        del parts["seconds"]
        found.append((gradients(stage), parts))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4)
    assert 0.2 < found[1][1]["selected_in"] < 0.8


@pytest.mark.parametrize("name", ["digits", "digits-multilabel", "digits loss.temperature=4"])
@pytest.mark.parametrize("forward", ["false", "true"])
def test_fused_head(name, forward):
    found = []
    for head in ("full", "fused"):
        stage = stage_of("greg", *f"data.name={name}".split(), f"head={head}", f"split_forward={forward}")
        parts = [stage.advance() for _ in range(3)]
        for one in parts:
            del one["seconds"]
        found.append((parts, [one.clone() for one in stage.model.parameters()]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert other == pytest.approx(one, rel=5e-4, abs=1e-6)
        assert one["selected_in"] > 0
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=2e-5)


def test_finite_differences_on_a_smooth_network():
    model = smooth(split_of())
    found = []
    for order in ("exact", "finite_difference"):
        stage = stage_of("greg", f"loss.second_order={order}", "loss.gradient_scale=paper", model=model)
        stage.advance()
        found.append(gradients(stage))
    assert (found[1] - found[0]).norm() < 2e-3 * found[0].norm()
    assert not torch.equal(*found)


def test_finite_differences_are_of_float32_energies():
    """Under autocast too: of bfloat16 activations they are 12 % off."""
    split, found = split_of(), []
    for options in ((), ("loss.second_order=finite_difference", "precision=bf16")):
        stage = stage_of("greg", *options, model=smooth(split), decided=None)
        stage = stage_of("greg", *options, model=smooth(split), decided=margins_of(stage))
        images = torch.cat([stage.next_batch()[0]])
        network = Energies(stage.model.model, stage.objective.method)
        with stage.autocast():
            value = stage.objective.penalty(network, stage.model.normalize(images), torch.ones(len(images)))
        found.append(torch.autograd.grad(value, [p for p in network.parameters() if p.dim() > 1]))
    for exact, estimate in zip(*found, strict=True):
        assert (exact - estimate).norm() < 2e-3 * exact.norm()


def test_finite_differences_on_kinks_are_an_error_before_training(tmp_path, capsys):
    options = ["loss.second_order=finite_difference", "epochs=1", "pretrain.epochs=1", "model.width=4"]
    assert main(["train", "method=greg", *options, f"output={tmp_path}", "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("oodkern train: loss.second_order: ")
    assert message.count("\n") == 1
    assert not list(tmp_path.rglob("last.ckpt"))


def test_no_sample_selected_is_an_error(tmp_path, capsys):
    fixed = ["loss.margins=fixed", "loss.margin_in=-1000", "loss.margin_out=1000"]
    short = ["epochs=2", "pretrain.epochs=1", "model.width=4", "data.limit=320", f"output={tmp_path}", "--quiet"]
    for method in ("greg", "gregplus"):
        assert main(["train", f"method={method}", *short, *fixed]) == 2
        message = capsys.readouterr().err
        assert message.startswith(
            "oodkern train: loss.margin_in, loss.margin_out: expected margins that some energies satisfy; none was "
            "under -1e+03 (ID) or over 1e+03 (outliers)"
        )
        assert message.rstrip().endswith(f"(epoch 1 of {method})")
        assert message.count("\n") == 1


def test_one_side_selected_is_none():
    objective = stage_of("greg").objective
    objective.check_epoch({"selected_in": 0.0, "selected_out": 0.01})
    objective.check_epoch({"selected_in": 0.01, "selected_out": 0.0})
    with pytest.raises(ValueError, match="no sample was selected"):
        objective.check_epoch({"selected_in": 0.0, "selected_out": 0.0})


def test_the_score_is_the_energy():
    from oodkern.methods.greg import GRegOptions

    logits = torch.randn(7, 6)
    method = METHODS["greg"](GRegOptions(temperature=3.0))
    torch.testing.assert_close(method.score(Output(logits, logits), logits), energies(logits, 3.0))
