"""Scores, margins, and the loss that a method binds."""

import pytest
import torch

from oodkern import energy
from oodkern.classifier import Output
from oodkern.methods import METHODS, as_score
from oodkern.methods.energy import EnergyOptions, auto_margins


def test_scores_are_larger_for_ood():
    sure, unsure = torch.tensor([[12.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.2]])
    for name in ("energy", "msp", "joint_energy", "max_logit"):
        assert as_score(name, sure) < as_score(name, unsure)
    torch.testing.assert_close(as_score("msp", unsure), -unsure.softmax(-1).amax(-1))
    torch.testing.assert_close(as_score("joint_energy", unsure), -torch.nn.functional.softplus(unsure).sum(-1))
    with pytest.raises(ValueError, match="expected one of energy, msp, joint_energy, max_logit"):
        as_score("entropy", sure)


def test_auto_margins():
    ids, outliers = torch.linspace(-12, -8, 101), torch.linspace(-6, -2, 101)
    assert auto_margins(ids, outliers) == pytest.approx((-11.0, -3.0))
    margin_in, margin_out = auto_margins(outliers, ids - 5)  # a model that has them the wrong way round
    assert margin_in < margin_out
    constant = torch.full((9,), -3.0)
    margin_in, margin_out = auto_margins(constant, constant)
    assert margin_in < margin_out


def test_the_temperature_reaches_margins_and_score():
    """Margins that are quantiles of other energies than the loss's would hold for none of them."""
    method = METHODS["energy"](EnergyOptions(temperature=4.0))
    ids, outliers = torch.randn(400, 6) * 4, torch.randn(300, 6)
    decided = method.decide(ids, outliers)
    loss = method.build_loss(decided)
    assert loss.temperature == 4.0
    assert decided["id_inside"] == pytest.approx(0.25, abs=0.01)
    assert decided["outliers_inside"] == pytest.approx(0.25, abs=0.01)
    _, parts = loss(ids, torch.zeros(400, dtype=torch.int64), outliers, return_parts=True)
    hinge = (energy(ids, 4.0) - decided["margin_in"]).relu().square().mean()
    torch.testing.assert_close(parts["energy_in"], hinge)
    torch.testing.assert_close(method.score(Output(ids, ids), ids), energy(ids, 4.0))
