"""OAL's loss against its formula, written out in float64; where its gradients go; the two modes of CLUB."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oal_formula import EVERY, LATENTS, D, K, N, U, batch, build, formula, transferred
from oracle import like

import oodkern
from oodkern.losses.oal import OALLoss


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_value_and_gradients(options, backend):
    loss = build(**options)
    expected_loss = copy.deepcopy(loss)
    h, z, *rest = batch(loss)
    results = []
    with oodkern.backend(backend):
        for one, function in ((loss, loss), (expected_loss, lambda *a: formula(expected_loss, *a))):
            leaves = [x.clone().requires_grad_() for x in (h, z)]
            value = function(*leaves, *rest)
            value, extra = value if isinstance(value, tuple) else (value, 0.0)
            wanted = [*leaves, *one.parameters()]
            gradients = torch.autograd.grad((value + extra) * like(value), wanted)
            results.append([value.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1:])


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_parts_make_the_loss(options):
    loss = build(**options)
    value, parts = loss(*batch(loss), return_parts=True)
    weights = {"ce": 1.0, "distillation": loss.weight_logits, "feature_distillation": loss.weight_features}
    weights |= {"club_1": loss.weight_mi[0], "club_2": loss.weight_mi[-1], "info_nce": loss.weight_mi[0]}
    likelihoods = [name for name in parts if name.startswith("likelihood")]
    assert likelihoods == (["likelihood_1", "likelihood_2"] if loss.club_mode == "mle" else [])
    assert not any(part.requires_grad for part in parts.values())
    total = sum(weights[name] * part for name, part in parts.items() if name not in likelihoods)
    torch.testing.assert_close(total, value.detach())


def test_maximum_likelihood_goes_to_q_alone_and_the_bound_to_the_features_alone():
    """Two losses that differ in q's mode alone: the same value and gradient in h, others in q."""
    literal, mle = build(), build(club_mode="mle")
    inputs = batch(literal)
    h = inputs[0].requires_grad_()
    names = [name for name, _ in literal.named_parameters()]
    value, parts = literal(*inputs, return_parts=True)
    value_mle, parts_mle = mle(*inputs, return_parts=True)
    assert torch.equal(value, value_mle)
    assert torch.equal(parts["club_2"], parts_mle["club_2"])
    a = torch.autograd.grad(value, [h, *literal.parameters()])
    b = torch.autograd.grad(value_mle, [h, *mle.parameters()])
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-12)
    of_q = {name: (x, y) for name, x, y in zip(names, a[1:], b[1:], strict=True) if name.startswith("conditionals")}
    assert len(of_q) == 4 + 4 + 8 + 4
    assert all((x - y).abs().max() > 1e-3 for x, y in of_q.values())


def test_maximum_likelihood_fits_q():
    """Of a y that x tells: the descent that the loss gives finds the conditional mean; as released it does not."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x @ torch.randn(4, 32)
    error = {}
    for mode in ("literal", "mle"):
        loss = build(torch.float32, features=32, latents=(4,), club_mode=mode)
        _, z, target, _, t, u = batch(loss, 256, torch.float32)
        optimizer = torch.optim.Adam(loss.conditionals.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss(y, z, target, x, t, u).backward()
            optimizer.step()
        with torch.no_grad():
            error[mode] = (loss.conditionals[0].mean(x) - y).square().mean() / y.square().mean()
    assert error["mle"] < 0.1 < 1 < error["literal"]


def test_over_random_pairings_the_term_and_its_gradient_vanish():
    """For a fixed q: the mean over pairings is 0 within its own Monte-Carlo error, though one pairing's is not."""
    loss = build()
    h, x = batch(loss)[0].requires_grad_(), batch(loss)[3][1]
    q, generator = loss.conditionals[1], torch.Generator().manual_seed(1)
    with torch.no_grad():
        mean, log_variance = q(x[:N])
    drawn = []
    for _ in range(4000):
        order = torch.randperm(N, generator=generator)
        value = oodkern.club(mean[order], log_variance[order], h)
        drawn.append(torch.cat([value.detach().reshape(1), *torch.autograd.grad(value, h)[0]]))
    drawn = torch.stack(drawn)
    standard_error = drawn.std(0) / math.sqrt(len(drawn))
    sigmas = (drawn.mean(0) / standard_error)[drawn.std(0) > 1e-9]
    assert len(sigmas) > N * D / 2
    assert sigmas.abs().max() < 5
    assert sigmas.square().mean() < 2  # of about 90 numbers that should be 1 in the mean
    assert drawn.abs().mean(0).max() > 20 * standard_error.median()


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_a_mixed_batch_is_one_without_its_outliers(options):
    results = []
    for mixed in (False, True):
        loss = build(**options)
        h, z, y, banks, t, u = batch(loss)
        if mixed:
            place = torch.tensor([0, 3, 4, 7, 8, 9, 10, 11, 13, 14, 15])

            def spread(rows, place=place):
                wide = torch.full((16, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
                return wide.index_copy(0, place, rows)

            h, z, t, u = (spread(rows) for rows in (h, z, t, u))
            y = torch.full((16,), -1).index_copy(0, place, y)
        leaves = [h.requires_grad_(), z.requires_grad_()]
        value = loss(h, z, y, banks, t, u)
        gradients = list(torch.autograd.grad(value, [*leaves, *loss.parameters()]))
        if mixed:
            left = torch.ones(16, dtype=torch.bool).index_fill(0, place, False)
            assert all((gradient[left] == 0).all() for gradient in gradients[:2])
            gradients[:2] = [gradient[place] for gradient in gradients[:2]]
        results.append([value.detach(), *gradients, *loss.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["no rows", "outliers alone", "one row"])
@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_nothing_and_one_row(options, kind):
    loss = build(torch.float32, **options)
    h, z, y, banks, t, u = batch(loss, 0 if kind == "no rows" else 3, torch.float32)
    if kind != "no rows":
        y[1:] = -1
    if kind == "outliers alone":
        y[0] = -1
    before = copy.deepcopy(dict(loss.named_buffers()))
    leaves = [h.requires_grad_(), z.requires_grad_()]
    value, parts = loss(h, z, y, banks, t, u, return_parts=True)
    gradients = torch.autograd.grad(value, [*leaves, *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    if kind == "one row":
        assert value > 0
        row = F.kl_div(F.log_softmax(h[:1], -1), F.softmax(transferred(loss, u[:1], running=True), -1), reduction="sum")
        torch.testing.assert_close(parts["feature_distillation"], row.detach(), rtol=1e-5, atol=1e-6)
    else:
        assert value == 0
        assert all((gradient == 0).all() for gradient in gradients)
    for name, buffer in loss.named_buffers():
        assert torch.equal(buffer, before[name]) or (kind == "one row" and name == "prototypes")


def test_prototypes():
    loss = OALLoss(D, K, U, LATENTS, contrast="infonce", momentum=0.75).double()
    h, z, y, banks, t, u = batch(loss, 40)
    expected = torch.zeros(K, D, dtype=torch.float64)
    for step in range(3):
        rows = h.roll(step, 1) + step
        target = y.clamp_max(K - 2 - step)  # fewer classes step by step: others stay; the last one is never seen
        loss(rows, z, target, banks, t, u)
        for k in target.unique():
            expected[k] = 0.75 * expected[k] + 0.25 * F.normalize(rows[target == k].mean(0), dim=0)
    torch.testing.assert_close(loss.prototypes, expected, rtol=1e-12, atol=1e-12)
    assert (loss.prototypes[K - 1] == 0).all()
    torch.testing.assert_close(loss.prototypes[K - 2].norm(), torch.tensor(0.25, dtype=torch.float64))
    loss.eval()
    value = loss(h, z, y, banks, t, u)
    torch.testing.assert_close(loss.prototypes, expected, rtol=1e-12, atol=1e-12)
    fewer, none = ([bank[:rows] for bank in banks] for rows in (2, 0))
    assert value > loss(h, z, y, fewer, t, u) > loss(h, z, y, none, t, u)  # each outlier is one more negative


def test_two_forwards_before_a_backward():
    """Prototypes move in place: what the first backward needs must not."""
    loss = build(contrast="infonce")
    h, *rest = batch(loss)
    h.requires_grad_()
    (loss(h, *rest) + loss(h * 2, *rest)).backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_low_precision(options, dtype):
    """Logits up to 60 and more: finite, in float32, near the float64 formula of the rounded inputs."""
    loss = build(torch.float32, **options)
    exact = copy.deepcopy(loss).double()
    h, z, y, banks, t, u = batch(loss, dtype=dtype, scale=4.0)
    z, t = (rows.double().mul(60 / rows.double().abs().max()).to(dtype) for rows in (z, t))
    z[0, 0], t[0, 0] = 60, -60
    z.requires_grad_()
    h.requires_grad_()
    value = loss(h, z, y, banks, t, u)
    assert value.dtype == torch.float32
    gradients = torch.autograd.grad(value, [h, z, *loss.parameters()])
    assert gradients[0].dtype == dtype
    assert all(gradient.isfinite().all() for gradient in gradients)
    expected, _ = formula(exact, h.double(), z.double(), y, [bank.double() for bank in banks], t.double(), u.double())
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
def test_autocast_rounds_nothing(options):
    results = []
    for enabled in (False, True):
        loss = build(torch.float32, **options)
        h, z, y, banks, t, u = batch(loss, dtype=torch.float32)
        h.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(h, z.bfloat16(), y, banks, t.bfloat16(), u)
        results.append([value, *torch.autograd.grad(value, [h, *loss.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_dtypes_of_student_and_teacher_may_differ():
    loss = build(torch.float32)
    h, z, y, banks, t, u = batch(loss)
    value = loss(h.float(), z, y, [banks[0].bfloat16(), banks[1].float()], t.float(), u.half())
    assert value.dtype == torch.float64
    again = loss(h, z.float(), y.int(), [banks[0].bfloat16().float(), banks[1]], t, u.half().float())
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-4)
