"""Separation's loss against its formula, written out in float64; from features; where its gradients go."""

import pytest
import torch
import torch.nn.functional as F
from oracle import like, value_and_gradients
from separation_formula import EVERY, D, K, M, N, batch, build, directions, formula, logits_of, mixed, terms

import oodkern
from oodkern.losses import OutlierExposureLoss, SeparationLoss

REDUCTIONS = ("mean", "sum", "batchmean", "none")


@pytest.fixture(params=EVERY)
def loss(request):
    return build(request.param)


def close(ours, expected, loss):
    """A basis is float32, whatever the features are."""
    tolerance = 1e-6 if loss.separation == "projection" else 1e-11
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def used(function):
    """Of all inputs, also where a term is left out."""
    return lambda *inputs: function(*inputs) + sum(0.0 * rows.sum() for rows in inputs)


def test_defaults():
    loss = SeparationLoss()
    assert (loss.alpha, loss.beta, loss.sep_reduction, loss.separation) == (1.0, 1.0, "auto", "cosine")
    assert (loss.rank, loss.refresh, loss.reduction, loss.multi_label) == (None, 100, "mean", False)
    assert isinstance(loss.outlier_loss, OutlierExposureLoss)
    assert loss.outlier_loss.alpha == 0.5
    assert "sep_reduction='auto', separation='cosine', reduction='mean'" in repr(loss)
    assert "separation='projection', rank=3, refresh=100" in repr(build("rank"))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_value_and_gradients(loss, backend):
    """Features, weight and logits as three inputs of their own: the weight gets nothing of the two terms."""
    x, w, z, y, xo, zo = logits_of(loss, *batch())
    inputs = (x, z, xo, zo)
    with oodkern.backend(backend):
        ours = value_and_gradients(used(lambda x, z, xo, zo: loss(x, w, z, y, xo, zo)), inputs)
    expected = value_and_gradients(used(lambda x, z, xo, zo: formula(loss, x, w, z, y, xo, zo)), inputs)
    close(ours, expected, loss)
    leaf = w.clone().requires_grad_()
    value = loss(x.requires_grad_(), leaf, z, y, xo.requires_grad_(), zo)
    assert torch.autograd.grad(value, leaf, allow_unused=True) == (None,)


def test_a_mixed_batch_is_a_split_one(loss):
    x, w, z, y, xo, zo = logits_of(loss, *batch())
    for reduction in REDUCTIONS[:3]:
        loss.reduction = reduction

        def split(x, z, xo, zo):
            return loss(x, w, z, y, xo, zo)

        def one(x, z, xo, zo):
            rows, logits, labels = mixed(x, z, y, xo, zo)
            return loss(rows, w, logits, labels)

        for a, b in zip(*(value_and_gradients(used(f), (x, z, xo, zo)) for f in (one, split)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        rows, logits, labels = mixed(x, z, y, xo, zo)
        (_, parts), (_, expected) = (
            loss(*arguments, return_parts=True) for arguments in ((rows, w, logits, labels), (x, w, z, y, xo, zo))
        )
        assert parts.keys() == expected.keys()
        assert all(torch.allclose(parts[name], expected[name], rtol=1e-12) for name in parts)
        assert not any(part.requires_grad for part in parts.values())


def test_reductions(loss):
    arguments = logits_of(loss, *batch())
    loss.reduction = "none"
    rows = loss(*arguments)
    assert rows.shape == (N + M,)
    cluster, separation = terms(loss, *arguments)
    times = K if loss.separation == "cosine" and loss.sep_reduction == "auto" else 1
    outlier = loss.outlier_loss
    kept, outlier.reduction = outlier.reduction, "none"
    base = outlier(arguments[2], arguments[3], arguments[5])
    outlier.reduction = kept
    expected = base + torch.cat([loss.alpha * cluster, loss.beta * times * separation])
    close([rows], [expected], loss)
    for reduction, value in (
        ("mean", rows[:N].mean() + rows[N:].mean()),
        ("sum", rows.sum()),
        ("batchmean", rows.sum() / (N + M)),
    ):
        loss.reduction = reduction
        torch.testing.assert_close(loss(*arguments), value, rtol=1e-12, atol=0)


def test_parts_make_the_loss(loss):
    arguments = logits_of(loss, *batch())
    value, parts = loss(*arguments, return_parts=True)
    outlier = loss.outlier_loss.alpha
    times = K if loss.separation == "cosine" and loss.sep_reduction == "auto" else 1
    weights = {"ce": 1.0, "oe": outlier, "energy_in": outlier, "energy_out": outlier}
    weights |= {"cluster": loss.alpha, "separation": loss.beta * times}
    torch.testing.assert_close(sum(weights[name] * part for name, part in parts.items()), value)
    assert ("cluster" in parts, "separation" in parts) == (loss.alpha > 0, loss.beta > 0)
    expected = dict(zip(("cluster", "separation"), terms(loss, *arguments), strict=True))
    for name in expected.keys() & parts.keys():
        close([parts[name]], [expected[name].mean()], loss)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("style", ["split", "mixed"])
def test_from_features(loss, style, reduction, with_bias):
    """The loss of the logits; the weight gets the gradients of CE and of the outlier loss alone."""
    loss.reduction = reduction
    x, w, b, y = batch()
    rows, _, labels = mixed(x[:N], x[:N], y, x[N:], x[N:])

    def fused(x, w, b=None, **options):
        return loss.from_features(x, w, b, *((y, N) if style == "split" else (labels,)), **options)

    def full(x, w, b=None, **options):
        z = F.linear(x, w, b)
        if style == "split":
            return loss(x[:N], w, z[:N], y, x[N:], z[N:], **options)
        return loss(x, w, z, labels, **options)

    def outlier_alone(x, w, b=None):
        """Without the two terms: what may reach the weight."""
        outlier = loss.outlier_loss
        kept, outlier.reduction = outlier.reduction, reduction
        z = F.linear(x, w, b)
        value = outlier(z[:N], y, z[N:]) if style == "split" else outlier(z, labels)
        outlier.reduction = kept
        return value

    inputs = (x if style == "split" else rows, w, *([b] if with_bias else []))
    ours, expected = value_and_gradients(fused, inputs), value_and_gradients(full, inputs)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    of_head = value_and_gradients(outlier_alone, inputs)
    for one, other in zip(ours[2:], of_head[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        assert one.abs().sum() > 0
    (_, parts), (_, others) = (function(*inputs, return_parts=True) for function in (fused, full))
    assert parts.keys() == others.keys()
    assert all(torch.allclose(parts[name], others[name], rtol=1e-11) for name in parts)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_gradients_are_formed_with_the_scores(loss, reduction):
    """The two terms do not change the slopes of the others: three products, and what `separation` takes itself."""
    x, w, b, y = batch()

    def products(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
        before = torch.ops.oodkern.multiplications()
        torch.autograd.grad(0.3 * function(*leaves), leaves, allow_unused=True)
        return torch.ops.oodkern.multiplications() - before

    def term(x, w, b):
        if loss.separation == "projection":
            return sum(oodkern.subspace_energy(x[N:], loss.basis)).sum()
        return oodkern.alignment(x[N:], w.detach()).sum()

    loss.reduction = reduction
    found = products(lambda *a: loss.from_features(*a, y, N))
    assert found == 3 * (N + M) * K * D + (products(term) if loss.beta else 0)


@pytest.mark.parametrize(("rows", "outliers"), [(0, M), (N, 0), (0, 0)])
def test_empty_parts_keep_the_graph(loss, rows, outliers):
    x, w, b, y = batch(rows=rows, outliers=outliers)
    arguments = logits_of(loss, x, w, b, y)
    leaves = [tensor.clone().requires_grad_() for tensor in (arguments[0], arguments[4])]
    value, parts = loss(leaves[0], w, arguments[2], y, leaves[1], arguments[5], return_parts=True)
    assert all(part.isfinite() for part in (value, *parts.values()))
    gradients = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else []
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert value.requires_grad == bool(loss.alpha or loss.beta)
    every, z, labels = mixed(arguments[0], arguments[2], y, arguments[4], arguments[5])
    torch.testing.assert_close(loss(every, w, z, labels), value.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss.from_features(x, w, b, y, rows), value.detach(), rtol=1e-12, atol=1e-13)


def test_other_rows_do_not_reach_a_part(loss):
    x, w, z, y, xo, zo = logits_of(loss, *batch())
    xo[3, 1] = zo[2, 2] = torch.nan
    rows, logits, labels = mixed(x, z, y, xo, zo)
    _, parts = loss(rows, w, logits, labels, return_parts=True)
    assert all(parts[name].isfinite() for name in parts.keys() & {"ce", "cluster", "energy_in"})


def test_features_of_zeros(loss):
    """Have no direction: a cosine of 0, a gradient of 0."""
    x, w, z, y, xo, zo = logits_of(loss, *batch())
    x[1] = xo[4] = 0.0
    w[2] = 0.0
    x.requires_grad_(), xo.requires_grad_()
    loss.reduction = "none"
    value = loss(x, w, z, y, xo, zo)
    assert value.isfinite().all()
    if not value.requires_grad:
        return
    for leaf, row in ((x, 1), (xo, 4)):
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)
        if gradient is not None:
            assert gradient.isfinite().all()
            assert (gradient[row] == 0).all()
            assert (gradient.abs().sum(1) > 0).sum() >= len(leaf) - 1 - (y == 2).sum()


def test_outlier_exposure_is_a_difference_of_two_reductions():
    """LSE(z) - (x.wbar + bbar)."""
    x, w, b, y = batch()
    _, parts = build("sum").from_features(x, w, b, y, N, return_parts=True)
    xo = x[N:]
    expected = torch.logsumexp(F.linear(xo, w, b), -1) - (xo @ w.mean(0) + b.mean())
    torch.testing.assert_close(parts["oe"], expected.mean(), rtol=1e-12, atol=0)


def test_cosines_from_logits_with_a_bias():
    """sum_c |cos| = sum_c |z_c - b_c| r_c / |x|, r_c = 1 / |w_c|."""
    x, w, b, y = batch()
    arguments = logits_of(None, x, w, b, y)
    _, parts = build("sum")(*arguments, return_parts=True)
    xo, zo = arguments[4:]
    sums = ((zo - b).abs() / w.norm(dim=1)).sum(1) / xo.norm(dim=1)
    torch.testing.assert_close(parts["separation"], sums.mean() / K, rtol=1e-12, atol=0)


def test_the_gradient_of_the_cosines():
    """(1 / (K M)) (t - (t.x') x') / |x| with x' = x / |x|, t = sum_c sign(cos_c) w'_c."""
    x, w, _, y = batch()
    loss = SeparationLoss(alpha=0.0, beta=1.0, sep_reduction="mean")
    z = torch.zeros(N + M, K, dtype=torch.float64)
    xo = x[N:].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x[:N], w, z[:N], y, xo, z[N:]), xo)
    xo = xo.detach()
    length = xo.norm(dim=1, keepdim=True)
    unit = xo / length
    t = directions(xo, w).sign() @ (w / w.norm(dim=1, keepdim=True))
    analytic = (t - (t * unit).sum(1, keepdim=True) * unit) / length / (K * M)
    torch.testing.assert_close(found, analytic, rtol=1e-11, atol=1e-14)
    step = 1e-6
    for i in range(M):
        for j in range(D):
            ends = []
            for sign in (1, -1):
                moved = xo.clone()
                moved[i, j] += sign * step
                ends.append(directions(moved, w).abs().mean())
            assert abs((ends[0] - ends[1]) / (2 * step) - analytic[i, j]) < 1e-9


def test_scaled_upstream():
    x, w, z, y, xo, zo = logits_of(None, *batch())
    leaf = xo.requires_grad_()
    value = build("sum")(x, w, z, y, leaf, zo)
    once, often = (torch.autograd.grad(value, leaf, g, retain_graph=True)[0] for g in (value * 0 + 1, like(value)))
    torch.testing.assert_close(often, once * like(value))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles(compiler):
    arguments = logits_of(None, *batch(torch.float32))
    loss = build("sum")
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    results = []
    for function in (compiled, loss):
        leaves = [rows.clone().requires_grad_() for rows in (arguments[0], arguments[4])]
        value = function(leaves[0], *arguments[1:4], leaves[1], arguments[5])
        results.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
