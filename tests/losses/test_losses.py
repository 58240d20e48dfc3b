"""Losses of logits alone against their formulas, written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import like

import oodkern
from oodkern.losses import ClassificationLoss, EDGELoss, EnergyLoss, OutlierExposureLoss
from oodkern.losses.base import COUPLED, REDUCTIONS

N, M, K = 9, 14, 7
# How often each label occurs in training.
COUNTS = torch.tensor([50, 3, 20, 3, 100, 7, 1])


def single_label(dtype=torch.float64):
    torch.manual_seed(3)
    return (torch.randn(N, K) * 4).to(dtype), torch.randint(0, K, (N,)), (torch.randn(M, K) * 4).to(dtype)


def multi_label(dtype=torch.float64):
    logits_id, _, logits_ood = single_label(dtype)
    target = torch.randint(0, 2, (N, K))
    target[2] = 0  # a row without labels is ID all the same
    return logits_id, target, logits_ood


def oe_formula(zi, y, zo, alpha=0.5):
    zi, zo = zi.double(), zo.double()
    return F.cross_entropy(zi, y) + alpha * -(F.log_softmax(zo, -1).mean(-1)).mean()


def energy_formula(zi, y, zo, alpha=0.1, margin_in=-9.0, margin_out=-6.0, T=1.0):
    zi, zo = zi.double(), zo.double()
    ei, eo = (-T * torch.logsumexp(z / T, -1) for z in (zi, zo))
    return (
        F.cross_entropy(zi, y)
        + alpha * ((ei - margin_in).relu() ** 2).mean()
        + alpha * ((margin_out - eo).relu() ** 2).mean()
    )


def multi_label_oe_formula(zi, y, zo, alpha=0.5):
    zi, zo = zi.double(), zo.double()
    return F.binary_cross_entropy_with_logits(zi, y.double()) + alpha * F.softplus(zo, threshold=99).mean()


def multi_label_energy_formula(zi, y, zo, alpha=0.1, margin_in=-15.0, margin_out=-10.0):
    zi, zo = zi.double(), zo.double()
    ei, eo = (-F.softplus(z, threshold=99).sum(-1) for z in (zi, zo))
    hinges = ((ei - margin_in).relu() ** 2).mean() + ((margin_out - eo).relu() ** 2).mean()
    return F.binary_cross_entropy_with_logits(zi, y.double()) + alpha * hinges


def edge_formula(zi, y, zo, alpha=0.7, beta=0.3, margin=1.5, tail_fraction=0.4, counts=None):
    """The tail by Python's sort, the gap of all pairs."""
    zi, zo = zi.double(), zo.double()
    ji, jo = (torch.logaddexp(z, torch.zeros_like(z)).sum(-1) for z in (zi, zo))

    def place(i):
        own = [] if counts is None else [int(n) for n, label in zip(counts, y[i], strict=True) if label]
        rarest = 0 if counts is None else min(own, default=float("inf"))
        return rarest, ji[i].item(), i

    tail = sorted(range(len(zi)), key=place)[: max(round(tail_fraction * len(zi)), 1)]
    value = F.binary_cross_entropy_with_logits(zi, y.double()) + alpha * (jo / zo.shape[1]).mean()
    return value + beta * (jo - ji[tail][:, None] + margin).relu().mean() if beta else value


CASES = {
    "ce": (ClassificationLoss(), lambda zi, y, zo: F.cross_entropy(zi.double(), y), single_label),
    "ce multi-label": (
        ClassificationLoss(multi_label=True),
        lambda zi, y, zo: F.binary_cross_entropy_with_logits(zi.double(), y.double()),
        multi_label,
    ),
    "oe": (OutlierExposureLoss(), oe_formula, single_label),
    "energy": (EnergyLoss(margin_in=-9.0, margin_out=-6.0), energy_formula, single_label),
    "energy T": (
        EnergyLoss(margin_in=-9.0, margin_out=-6.0, temperature=2.5),
        lambda *a: energy_formula(*a, T=2.5),
        single_label,
    ),
    "oe multi-label": (OutlierExposureLoss(multi_label=True), multi_label_oe_formula, multi_label),
    "energy multi-label": (
        EnergyLoss(margin_in=-15.0, margin_out=-10.0, multi_label=True),
        multi_label_energy_formula,
        multi_label,
    ),
    "edge": (EDGELoss(0.7, 0.3, 1.5, 0.4), edge_formula, multi_label),
    "edge frequency": (
        EDGELoss(0.7, 0.3, 1.5, 0.4, "frequency", COUNTS),
        lambda *a: edge_formula(*a, counts=COUNTS),
        multi_label,
    ),
    "edge without a gap": (EDGELoss(0.7, 0.0), lambda *a: edge_formula(*a, beta=0.0), multi_label),
}


def reductions(loss):
    """Those that the loss knows."""
    return COUPLED if isinstance(loss, EDGELoss) else REDUCTIONS


def compiler(loss):
    """Inductor takes many seconds a loss: here it makes one kind, and EDGE's sorts in test_edge."""
    return "inductor" if isinstance(loss, EnergyLoss) else "aot_eager"


def costly(loss):
    """Compiled elsewhere in another form, but for one sort."""
    return isinstance(loss, EDGELoss) and loss.tail == "frequency"


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def mixed(logits_id, target, logits_ood):
    """The same rows as one shuffled batch, outliers marked by negative targets."""
    order = torch.randperm(N + M, generator=torch.Generator().manual_seed(1))
    logits = torch.cat([logits_id, logits_ood])[order]
    labels = torch.cat([target, target.new_full((M, *target.shape[1:]), -1)])[order]
    return logits, labels, order


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_value_and_gradients(case, backend):
    loss, formula, batch = case
    zi, y, zo = batch()
    results = []
    with oodkern.backend(backend):
        for function in (loss, formula):
            leaves = [z.clone().requires_grad_() for z in (zi, zo)]
            value = function(leaves[0], y, leaves[1])
            gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            results.append([value, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    sides = 1 if isinstance(loss, ClassificationLoss) else 2
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1 : sides + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_low_precision(case, dtype):
    loss, formula, batch = case
    zi, y, zo = batch(dtype)
    value = loss(zi, y, zo)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), formula(zi, y, zo), rtol=2e-6, atol=1e-6)


def test_mixed_is_split(case):
    loss, _, batch = case
    zi, y, zo = batch()
    logits, labels, order = mixed(zi, y, zo)
    (value, parts), (again, parts_again) = loss(zi, y, zo, return_parts=True), loss(logits, labels, return_parts=True)
    torch.testing.assert_close(again, value, rtol=1e-12, atol=0)
    assert parts.keys() == parts_again.keys()
    for name in parts:
        torch.testing.assert_close(parts_again[name], parts[name], rtol=1e-12, atol=0)
        assert not parts[name].requires_grad
    if loss.multi_label:
        is_ood = order >= N
        torch.testing.assert_close(loss(logits, labels.clamp_min(0), is_ood=is_ood), value, rtol=1e-12, atol=0)


def test_parts_make_the_loss(case):
    loss, _, batch = case
    value, parts = loss(*batch(), return_parts=True)
    weights = {"ce": 1.0, "bce": 1.0}
    if isinstance(loss, EDGELoss):
        weights["gap"] = loss.beta
    weighted = [weights[name] * part if name in weights else loss.alpha * part for name, part in parts.items()]
    torch.testing.assert_close(sum(weighted), value)


def test_reductions(case):
    loss, _, batch = case
    zi, y, zo = batch()
    logits, labels, order = mixed(zi, y, zo)

    def reduced(how, *arguments):
        loss.reduction = how
        try:
            return loss(*arguments)
        finally:
            loss.reduction = "mean"

    if "none" not in reductions(loss):  # each term is a mean over one part
        _, parts = loss(zi, y, zo, return_parts=True)
        known, unknown = (
            parts["bce"],
            sum(weight * parts[name] for name, weight in (("conf", loss.alpha), ("gap", loss.beta)) if weight),
        )
        for arguments in ((zi, y, zo), (logits, labels)):
            summed, averaged = reduced("sum", *arguments), reduced("batchmean", *arguments)
            torch.testing.assert_close(summed, N * known + M * unknown, rtol=1e-13, atol=0)
            torch.testing.assert_close(averaged, (N * known + M * unknown) / (N + M), rtol=1e-13, atol=0)
        return
    rows = reduced("none", zi, y, zo)
    assert rows.shape == (N + M,)
    torch.testing.assert_close(reduced("none", logits, labels), rows[order])
    torch.testing.assert_close(rows[:N].mean() + rows[N:].mean(), reduced("mean", zi, y, zo))
    for arguments in ((zi, y, zo), (logits, labels)):
        torch.testing.assert_close(reduced("sum", *arguments), rows.sum())
        torch.testing.assert_close(reduced("batchmean", *arguments), rows.sum() / (N + M))


def test_empty_parts_keep_the_graph(case):
    loss, _, batch = case
    zi, y, zo = batch()
    for i, t, o in ((zi[:0], y[:0], zo), (zi, y, zo[:0]), (zi[:0], y[:0], zo[:0])):
        leaves = [z.clone().requires_grad_() for z in (i, o)]
        value, parts = loss(leaves[0], t, leaves[1], return_parts=True)
        assert value.isfinite()
        assert all(part.isfinite() for part in parts.values())
        value.backward()
        used = leaves[:1] if isinstance(loss, ClassificationLoss) else leaves
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in used)
    for labels, empty in ((y, False), (torch.full_like(y, -1), isinstance(loss, ClassificationLoss))):
        leaf = zi.clone().requires_grad_()
        loss(leaf, labels).backward()
        assert leaf.grad.isfinite().all()
        assert bool(leaf.grad.abs().sum() > 0) != empty


def test_other_rows_do_not_reach_a_part(case):
    """A NaN or infinite outlier poisons the OOD part alone."""
    loss, _, batch = case
    zi, y, zo = batch()
    zo[3, 1] = torch.nan
    logits, labels, _ = mixed(zi, y, zo)
    _, parts = loss(logits, labels, return_parts=True)
    classification = parts["bce" if loss.multi_label else "ce"]
    assert classification.isfinite()


def test_mixed_and_split_agree_on_infinite_rows(case):
    """A row of all -inf has E = +inf: a part that it does not belong to must not see it, not even as 0 * inf."""
    loss, _, batch = case
    zi, y, zo = batch()
    zo[3] = -torch.inf
    logits, labels, order = mixed(zi, y, zo)
    split, leaf = torch.cat([zi, zo]).requires_grad_(), logits.clone().requires_grad_()
    expected, value = loss(split[:N], y, split[N:]), loss(leaf, labels)
    if loss(zi, y, zo).isfinite():  # OE of such a row is not defined
        torch.testing.assert_close(value, expected)
        (a,), (b,) = torch.autograd.grad(value, leaf), torch.autograd.grad(expected, split)
        assert b.isfinite().all()
        torch.testing.assert_close(a, b[order])
    else:
        assert isinstance(loss, OutlierExposureLoss)
        assert not loss.multi_label


def test_compiles(case):
    loss, _, batch = case
    if costly(loss):
        return
    zi, y, zo = batch(torch.float32)
    logits, labels, _ = mixed(zi, y, zo)
    torch._dynamo.reset()
    for arguments in ((zi, y, zo), (logits, labels)):
        # Where a mixed batch's outliers are counted the graph breaks.
        whole = len(arguments) == 3 or not (isinstance(loss, EDGELoss) and loss.beta)
        compiled = torch.compile(loss, fullgraph=whole, backend=compiler(loss))
        torch.testing.assert_close(compiled(*arguments), loss(*arguments))


def test_differentiable_twice(case):
    """A gradient penalty on the logits goes through the loss."""
    loss, formula, batch = case
    zi, y, zo = batch()
    results = []
    for function in (loss, formula):
        leaf = zi.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf, y, zo), leaf, create_graph=True)
        results += torch.autograd.grad((first * like(first)).sum(), leaf)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_defaults():
    loss = EnergyLoss()
    assert (loss.alpha, loss.margin_in, loss.margin_out, loss.temperature) == (0.1, -25.0, -7.0, 1.0)
    assert OutlierExposureLoss().alpha == 0.5
    assert "margin_in=-25.0" in repr(loss)


def test_classification_is_as_exact_as_it_says():
    """-E - z_y loses what a difference of two numbers of the size of the logits loses, and not more."""
    zi, y, _ = single_label()
    loss = ClassificationLoss(reduction="none")
    for offset in (0.0, 30.0, 1000.0):
        z = (zi + offset).float()
        exact = F.cross_entropy(z.double(), y, reduction="none")
        assert (loss(z, y).double() - exact).abs().max() <= 2 * z.abs().max() * 2**-23
