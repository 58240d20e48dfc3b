"""OAL's loss: what it is made of and what it refuses."""

import math

import pytest
import torch
from oal_formula import EVERY, LATENTS, D, K, U, batch, build

from oodkern.losses.oal import OALLoss


def test_learning_rates():
    loss = build()
    (transfer, fast), (nets, slow) = loss.learning_rates()
    assert (fast, slow) == (0.01 / 0.005, pytest.approx(1e-4 / 0.005))
    assert {id(p) for p in [*transfer, *nets]} == {id(p) for p in loss.parameters()}
    assert len(transfer) == 6
    assert [rate for _, rate in build(contrast="infonce").learning_rates()] == [2.0]
    assert build(**EVERY["identity"]).learning_rates() == []


def test_sizes_of_the_released_networks():
    loss = OALLoss(512, 100, 768, (768, 64))
    sizes = [[(m.in_features, m.out_features) for m in q.mean if hasattr(m, "weight")] for q in loss.conditionals]
    assert sizes == [[(768, 256), (256, 512)], [(64, 32), (32, 16), (16, 256), (256, 512)]]
    first, last = (loss.conditionals[1].log_variance[i] for i in (0, -1))
    assert first.out_features == 256
    assert isinstance(last, torch.nn.Tanh)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_state_returns(options):
    loss = build(**options)
    inputs = batch(loss)
    loss(*inputs)  # moves prototypes and running statistics
    again = OALLoss(**{"features": D, "classes": K, "teacher_features": U, "latents": LATENTS} | options).double()
    again.load_state_dict(loss.state_dict())
    assert ("prototypes" in loss.state_dict()) == (loss.contrast == "infonce")
    assert torch.equal(again(*inputs), loss(*inputs))


def test_repr():
    assert "contrast='club', club_mode='mle', transfer='mlp'" in repr(build(club_mode="mle"))
    assert "contrast_temperature=0.1, momentum=0.9" in repr(build(contrast="infonce"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": 0}, ValueError, "features: expected 1 or more, got 0"),
        ({"classes": 2.0}, TypeError, "classes: expected an integer, got float"),
        ({"latents": 6}, TypeError, "latents: expected one or two sizes, a sequence, got int"),
        ({"latents": (1, 2, 3)}, ValueError, "latents: expected one or two sizes, one a bank, got 3"),
        ({"latents": (6, 0)}, ValueError, r"latents\[1\]: expected 1 or more, got 0"),
        ({"weight_logits": -1}, ValueError, "weight_logits: expected a finite number that is not negative, got -1"),
        ({"weight_features": "8"}, TypeError, "weight_features: expected a number, got str"),
        ({"weight_mi": 0.1}, ValueError, "weight_mi: expected 2 numbers, one a bank, got 1"),
        ({"weight_mi": (0.1, math.nan)}, ValueError, r"weight_mi\[1\]: expected a finite number"),
        ({"temperature": 0}, ValueError, "temperature: expected a positive number"),
        ({"contrast": "nce"}, ValueError, "contrast: expected one of club, infonce, got 'nce'"),
        ({"club_mode": "x"}, ValueError, "club_mode: expected one of literal, mle, got 'x'"),
        ({"contrast_temperature": -1}, ValueError, "contrast_temperature: expected a positive number"),
        ({"momentum": 1}, ValueError, "momentum: expected a number below 1, got 1"),
        ({"transfer": "linear"}, ValueError, "transfer: expected one of mlp, identity, got 'linear'"),
        ({"transfer": "identity"}, ValueError, "transfer: 'identity' is for .* features=8 and teacher_features=6"),
        ({"contrast": "infonce", "latents": (5,)}, ValueError, r"latents\[0\]: expected 6 as teacher_features.*got 5"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda h: h[:, 1:], ValueError, r"features: expected \[11, 8\], got \[11, 7\]"),
        (0, lambda h: h.long(), TypeError, "features: expected one of"),
        (1, lambda z: z[1:], ValueError, r"logits: expected \[11, 5\], got \[10, 5\]"),
        (2, lambda y: y + K, ValueError, r"target: expected classes in 0\.\.4"),
        (2, lambda y: y.double(), TypeError, "target: expected integers"),
        (3, lambda x: x[0], ValueError, "outlier_latents: expected 2 tensors, one a bank, got 1"),
        (3, lambda x: None, TypeError, "outlier_latents: expected a tensor a bank, got NoneType"),
        (3, lambda x: [x[0], x[1].T], ValueError, r"outlier_latents\[1\]: expected \[M, 12\], got \[12, 13\]"),
        (3, lambda x: [x[0], x[1][:9]], ValueError, r"outlier_latents\[1\]: expected 11 rows or more, .* got 9"),
        (3, lambda x: [x[0].clone().requires_grad_(), x[1]], ValueError, r"outlier_latents\[0\]: .*no gradient"),
        (4, lambda t: t[:, 1:], ValueError, r"teacher_logits: expected \[11, 5\], got \[11, 4\]"),
        (4, lambda t: t.clone().requires_grad_(), ValueError, "teacher_logits: expected a tensor that requires no"),
        (5, lambda u: u[0], ValueError, r"teacher_features: expected \[N, D\], got \[6\]"),
        (5, lambda u: u.to("meta"), ValueError, "teacher_features: expected on cpu, where features are, got meta"),
    ],
)
def test_arguments_are_checked(place, change, error, message):
    loss = build()
    arguments = batch(loss)
    arguments[place] = change(arguments[place])
    before = loss.transfer.first.running_mean.clone()
    with pytest.raises(error, match=message):
        loss(*arguments)
    assert torch.equal(loss.transfer.first.running_mean, before), "work was done before the check"


def test_sixteen_bit_parameters_are_rejected():
    loss = build()
    with pytest.raises(
        TypeError, match="parameters: expected float32 or float64, whatever the inputs are, got bfloat16"
    ):
        loss.bfloat16()(*batch(loss))
