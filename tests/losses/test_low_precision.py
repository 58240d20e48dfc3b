"""Logits as large as trained networks give, in 16 bits: the formulas as written overflow, the losses do not."""

import pytest
import torch
import torch.nn.functional as F
from oal_formula import EVERY as OAL_EVERY
from oal_formula import batch as oal_batch
from oal_formula import build as oal_build
from oal_formula import formula as oal_formula
from separation_formula import formula as separation_formula
from test_losses import (
    edge_formula,
    energy_formula,
    multi_label_energy_formula,
    multi_label_oe_formula,
    oe_formula,
)

from oodkern.losses import ClassificationLoss, EDGELoss, EnergyLoss, GRegLoss, OutlierExposureLoss, SeparationLoss
from oodkern.losses.base import COUPLED, REDUCTIONS

N, M, D, K = 9, 14, 8, 7
HALVES = [torch.bfloat16, torch.float16]
SINGLE, MULTI = {"margin_in": -9.0, "margin_out": -6.0}, {"margin_in": -15.0, "margin_out": -10.0, "multi_label": True}


def classify(zi, y, zo):
    return F.cross_entropy(zi.double(), y)


def classify_labels(zi, y, zo):
    return F.binary_cross_entropy_with_logits(zi.double(), y.double())


LOSSES = {
    "ce": (ClassificationLoss, {}, classify),
    "ce multi-label": (ClassificationLoss, {"multi_label": True}, classify_labels),
    "oe": (OutlierExposureLoss, {}, oe_formula),
    "oe multi-label": (OutlierExposureLoss, {"multi_label": True}, multi_label_oe_formula),
    "energy": (EnergyLoss, SINGLE, energy_formula),
    "energy multi-label": (EnergyLoss, MULTI, multi_label_energy_formula),
    "edge": (EDGELoss, {"margin": 2.0}, lambda *a: edge_formula(*a, 1.0, 0.1, 2.0, 0.25)),
    "greg": (GRegLoss, SINGLE, energy_formula),
    "greg multi-label": (GRegLoss, MULTI, multi_label_energy_formula),
    "separation": (SeparationLoss, {}, None),
    "projection": (SeparationLoss, {"separation": "projection", "rank": 3}, None),
}


def logits(dtype, rows, largest, seed):
    """Between -largest and largest, both of which are there: as a class of its own, and beside the other."""
    z = torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)) * largest / 2
    z[0, 0], z[0, 1], z[1] = largest, -largest, -largest
    z[2] = largest
    return z.clamp(-largest, largest).to(dtype)


def batch(dtype, multi_label, largest):
    generator = torch.Generator().manual_seed(4)
    shape, values = ((N, K), 2) if multi_label else ((N,), K)
    target = torch.randint(values, shape, generator=generator)
    if multi_label:
        target[0, :2] = torch.tensor([0, 1])
    else:
        target[0] = 1  # the class of -largest
    features = torch.randn(N + M, D, generator=generator).relu().to(dtype)
    return logits(dtype, N, largest, 1), target, logits(dtype, M, largest, 2), features, torch.randn(K, D)


def plain(name, multi_label, zi, y, zo):
    """As papers and released codes write it, in the dtype of the logits."""

    def labels(z, y):
        return -(y * z.sigmoid().log() + (1 - y) * (1 - z.sigmoid()).log()).mean()

    def softmax(z):
        return z.exp() / z.exp().sum(-1, keepdim=True)

    def hinges(ei, eo, low, high):
        return 0.1 * (((ei - low).relu() ** 2).mean() + ((high - eo).relu() ** 2).mean())

    if multi_label:
        value = labels(zi, y.to(zi.dtype))
        ji, jo = (torch.log(1 + z.exp()).sum(-1) for z in (zi, zo))
        if name.startswith(("edge", "oe")):
            value = value + labels(zo, torch.zeros_like(zo))
        if name == "edge":
            value = value + 0.1 * (jo - ji[:, None]).relu().mean()
        return value + hinges(-ji, -jo, -15, -10) if name.startswith(("energy", "greg")) else value
    value = -softmax(zi)[torch.arange(len(y)), y].log().mean()
    if name in ("oe", "separation", "projection"):
        value = value - 0.5 * softmax(zo).log().mean()
    if name in ("energy", "greg"):
        value = value + hinges(-zi.exp().sum(-1).log(), -zo.exp().sum(-1).log(), -9, -6)
    return value


def apply(loss, zi, y, zo, features, weight):
    if isinstance(loss, SeparationLoss):
        return loss(features[:N], weight, zi, y, features[N:], zo)
    return loss(zi, y, None, zo) if isinstance(loss, GRegLoss) else loss(zi, y, zo)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("largest", [60.0, 90.0])
def test_finite_where_the_formula_as_written_is_not(name, dtype, largest):
    kind, options, formula = LOSSES[name]
    loss = kind(**options)
    zi, y, zo, features, weight = batch(dtype, loss.multi_label, largest)
    assert not plain(name, loss.multi_label, zi, y, zo).isfinite()
    if formula is None:
        expected = separation_formula(
            loss, features[:N].double(), weight.to(dtype if loss.separation == "cosine" else weight.dtype).double(),
            zi.double(), y, features[N:].double(), zo.double(),
        )  # fmt: skip
    else:
        expected = formula(zi, y, zo)
    for reduction in COUPLED if isinstance(loss, EDGELoss | GRegLoss) else REDUCTIONS:
        loss.reduction = reduction
        leaves = [tensor.clone().requires_grad_() for tensor in (zi, zo, features)]
        value = apply(loss, leaves[0], y, leaves[1], leaves[2], weight)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        used = [gradient for gradient in gradients if gradient is not None]
        assert len(used) == {ClassificationLoss: 1, SeparationLoss: 3}.get(kind, 2)
        for gradient in used:
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0
        if reduction == "mean":
            torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_overflows(dtype):
    """The pieces themselves: from where on the dtype has no number for them, and what the losses put there."""
    z = torch.tensor([60.0], dtype=dtype)
    assert (-torch.log(1 - z.sigmoid())).isinf()  # conf of EDGE: softplus z
    exponentials = torch.tensor([60.0, -60.0, 60.0], dtype=dtype).exp()
    assert not (exponentials / exponentials.sum()).log().isfinite().all()  # softmax
    largest = torch.tensor([60.0 if dtype == torch.float16 else 90.0], dtype=dtype)
    assert torch.log(1 + largest.exp()).isinf()  # JointEnergy: softplus z
    assert torch.log(largest.exp()).isinf()  # energy: logsumexp z
    none = torch.zeros(0, 1, dtype=dtype)
    _, parts = EDGELoss()(none, none, z[None], return_parts=True)
    assert parts["conf"] == 60.0
    gap = EDGELoss(tail_fraction=1.0)(-largest[None], torch.zeros(1, 1), largest[None], return_parts=True)[1]["gap"]
    assert gap == largest.item()


@pytest.mark.parametrize("style", ["split", "mixed"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", HALVES)
def test_from_features_never_rounds_logits_of_this_size(name, dtype, style):
    """Logits up to 60, of features and a head in 16 bits."""
    kind, options, _ = LOSSES[name]
    loss = kind(**options)
    _, y, _, features, weight = batch(dtype, loss.multi_label, 60.0)
    weight = weight.to(dtype) * 4
    weight = (weight * (60 / (features.float() @ weight.float().T).abs().max())).to(dtype)
    bias = torch.randn(K).to(dtype)
    arguments = (torch.cat([y, y.new_full((M, *y.shape[1:]), -1)]),) if style == "mixed" else (y, N)
    leaves = [tensor.requires_grad_() for tensor in (features, weight, bias)]
    value = loss.from_features(*leaves, *arguments)
    gradients = torch.autograd.grad(value, leaves)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)
    if loss.multi_label or kind is not SeparationLoss:
        z = F.linear(features.double(), weight.double(), bias.double())
        assert 55 < z.abs().max() < 65
        torch.testing.assert_close(value.double(), LOSSES[name][2](z[:N], y, z[N:]), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("options", OAL_EVERY.values(), ids=OAL_EVERY)
@pytest.mark.parametrize("dtype", HALVES)
def test_oal_is_finite_where_the_formula_as_written_is_not(options, dtype):
    loss, exact = oal_build(torch.float32, **options), oal_build(**options)
    h, z, y, banks, t, u = oal_batch(loss, dtype=dtype)
    z, t = (rows.clone() for rows in (z, t))
    z[0], t[0] = 60.0, 60.0
    z[0, y[0]], t[0, 0] = -60.0, -60.0

    def softmax(rows):
        return rows.exp() / rows.exp().sum(-1, keepdim=True)

    written = -softmax(z)[torch.arange(len(y)), y].log().mean()
    written = written + (softmax(t) * (softmax(t).log() - softmax(z).log())).sum(-1).mean()
    assert not written.isfinite()
    leaves = [h.requires_grad_(), z.requires_grad_()]
    value, parts = loss(h, z, y, banks, t, u, return_parts=True)
    assert value.dtype == torch.float32
    assert all(part.isfinite() for part in (value, *parts.values()))
    gradients = torch.autograd.grad(value, [*leaves, *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    expected, _ = oal_formula(exact, h.double(), z.double(), y, [x.double() for x in banks], t.double(), u.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-3)
