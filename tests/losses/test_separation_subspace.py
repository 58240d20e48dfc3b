"""Separation: what its terms are scaled by, its subspace, its precision."""

import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from separation_formula import EVERY, D, K, M, N, batch, build, logits_of, mixed, terms

from oodkern.losses import SeparationLoss


def separation(loss, arguments):
    return loss(*arguments, return_parts=True)[1]["separation"]


def test_the_sum_over_classes_is_so_many_means():
    arguments = logits_of(None, *batch())
    zero = SeparationLoss(beta=0.0)(*arguments)
    summed, mean = (SeparationLoss(sep_reduction=how)(*arguments) - zero for how in ("sum", "mean"))
    torch.testing.assert_close(summed, K * mean, rtol=1e-13, atol=0)
    _, parts = SeparationLoss(sep_reduction="sum")(*arguments, return_parts=True)
    assert torch.equal(parts["separation"], separation(SeparationLoss(sep_reduction="mean"), arguments))


@pytest.mark.parametrize(("classes", "same"), [(999, "sum"), (1000, "mean"), (1001, "mean")])
def test_auto_is_the_sum_below_a_thousand_classes(classes, same):
    w = torch.randn(classes, D)
    x = torch.randn(4, D)
    y = torch.tensor([0, 1])
    for how in ("sum", "mean"):
        auto, told = (SeparationLoss(sep_reduction=one).from_features(x, w, None, y, 2) for one in ("auto", how))
        assert torch.equal(auto, told) == (how == same)


@pytest.mark.parametrize("rank", [None, 1, 3, K, K + 2])
def test_projection_by_numpy(rank):
    x, w, b, y = batch()
    loss = SeparationLoss(separation="projection", rank=rank)
    found = separation(loss, logits_of(None, x, w, b, y))
    unit = x[N:].numpy() / np.linalg.norm(x[N:].numpy(), axis=1, keepdims=True)
    Q = np.linalg.qr(w.numpy().T).Q if rank is None else np.linalg.svd(w.numpy()).Vh[: min(rank, K)].T
    assert loss.basis.shape == (D, Q.shape[1])
    expected = np.square(unit @ Q).sum(1).mean()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


def test_a_span_that_is_smaller_than_its_weights():
    """Classes that are combinations of others; without a rank the span is as large as it is."""
    x, w, b, y = batch()
    w[3:] = w[:3] * 2 - w[1]
    loss = SeparationLoss(separation="projection")
    loss(*logits_of(None, x, w, b, y))
    assert loss.basis.shape == (D, 3)


def test_orthogonal_outliers_have_none():
    x, w, b, y = batch()
    Q = torch.linalg.svd(w).Vh.T
    x[N:] = torch.randn(M, D - K).double() @ Q[:, K:].T
    assert separation(build("projection"), logits_of(None, x, w, b, y)) < 1e-13
    x[N:] = torch.randn(M, K).double() @ w
    torch.testing.assert_close(separation(build("projection"), logits_of(None, x, w, b, y)).item(), 1.0)


def test_the_basis_is_made_anew_in_training_alone():
    x, w, b, y = batch()
    loss = SeparationLoss(separation="projection", refresh=3)
    seen = []
    for call in range(8):
        if call % 2:
            loss.from_features(x, w + call, b, y, N)
        else:
            loss(*logits_of(None, x, w + call, b, y))
        seen.append(loss.basis)
    made = [True, *(a is not b for a, b in itertools.pairwise(seen))]
    assert made == [True, False, False, True, False, False, True, False]
    assert not torch.equal(seen[0], seen[3])
    loss.eval()
    for _ in range(5):
        loss(*logits_of(None, x, w - 1, b, y))
    assert loss.basis is seen[-1]
    assert loss.calls == 8
    loss.train()
    loss(*logits_of(None, x, w - 1, b, y))
    assert loss.basis is seen[-1]
    loss(*logits_of(None, x, w - 1, b, y))
    assert loss.basis is not seen[-1]


def test_in_evaluation_the_first_basis_is_made_all_the_same():
    loss = SeparationLoss(separation="projection").eval()
    x, w, b, y = batch()
    value = loss.from_features(x, w, b, y, N)
    first = loss.basis
    assert torch.equal(loss.from_features(x, w, b, y, N), value)
    assert loss.basis is first
    assert loss.calls == 0
    loss.from_features(x[:, :7], w[:, :7], b, y, N)  # of another network
    assert loss.basis.shape == (7, K)


def test_without_the_term_no_basis_is_made():
    for options in ({"beta": 0.0, "separation": "projection"}, {}):
        loss = SeparationLoss(**options)
        loss(*logits_of(None, *batch()))
        assert loss.basis is None
        assert loss.calls == 0


@pytest.mark.parametrize("rank", [None, 2])
def test_state_returns(rank):
    """Also into a loss whose own basis has another rank, and through a file of tensors and numbers."""
    x, w, b, y = batch()
    options = {"separation": "projection", "refresh": 3, "rank": rank}
    loss, other = SeparationLoss(**options), SeparationLoss(**options)
    for i in range(4):
        loss.from_features(x, w + i, b, y, N)
    other.rank = 5
    other.from_features(x, w, b, y, N)
    other.rank = rank
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.basis, loss.basis)
    assert other.calls == loss.calls == 4
    for i in range(4):  # the next basis is made at the same call
        values = [one.from_features(x, w - i, b, y, N) for one in (loss, other)]
        assert torch.equal(*values)
        assert torch.equal(other.basis, loss.basis)
    fresh = SeparationLoss(**options)
    fresh.load_state_dict(SeparationLoss(**options).state_dict())
    assert fresh.basis is None


@pytest.mark.gpu
def test_a_basis_that_was_saved_follows_the_weights():
    x, w, b, y = batch(torch.float32)
    loss = SeparationLoss(separation="projection")
    loss.from_features(x, w, b, y, N)
    before = loss.basis
    loss.from_features(*(tensor.cuda() for tensor in (x, -w.flip(1), b, y)), N)
    assert torch.equal(loss.basis.cpu(), before)


def test_weights_that_span_everything_are_told_of_once():
    x, w, b, y = batch()
    w = torch.randn(D, D).double()
    b = torch.randn(D).double()
    loss = SeparationLoss(separation="projection")
    with pytest.warns(UserWarning, match=r"10 class weights span all 10 dimensions .* give a rank below 10"):
        loss.from_features(x, w, b, y, N)
    for one, classes in ((SeparationLoss(separation="projection", rank=D - 1), D), (SeparationLoss(), D), (loss, D)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.from_features(x, w[:classes], b[:classes], y, N)
    with pytest.warns(UserWarning, match="class weights span"):
        SeparationLoss(separation="projection", rank=D).from_features(x, w, b, y, N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SeparationLoss(separation="projection").from_features(x, w[: D - 1], b[: D - 1], y, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_16_bit_features_with_a_float32_weight(name, dtype):
    """The weight is rounded to what the features are, and nothing else."""
    x, w, z, y, xo, zo = logits_of(None, *batch(torch.float32))
    x, xo = (rows.to(dtype).requires_grad_() for rows in (x, xo))
    loss = build(name)
    value, parts = loss(x, w, z, y, xo, zo, return_parts=True)
    assert value.dtype == torch.float32
    rounded = w.to(dtype) if loss.separation == "cosine" else w
    cluster, _ = terms(loss, x.double(), w.to(dtype).double(), z.double(), y, xo.double(), zo.double())
    _, apart = terms(loss, x.double(), rounded.double(), z.double(), y, xo.double(), zo.double())
    for part, rows in (("cluster", cluster), ("separation", apart)):
        if part in parts:
            torch.testing.assert_close(parts[part].double(), rows.mean(), rtol=2e-6, atol=2e-7)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, (x, xo), allow_unused=True)
        assert all(gradient is None or gradient.dtype == dtype for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_span_of_16_bit_weights(dtype):
    """Ten weights of 2,048 numbers span ten dimensions, though 2,048 units in the last place are all that there is."""
    x, w, y = torch.randn(6, 2048).to(dtype), torch.randn(10, 2048).to(dtype), torch.tensor([1, 2, 3])
    loss = SeparationLoss(separation="projection")
    loss.from_features(x, w, None, y, 3)
    assert loss.basis.shape == (2048, 10)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("style", ["split", "mixed"])
def test_autocast_rounds_nothing(name, style):
    results = []
    for enabled in (False, True):
        loss = build(name)
        x, w, z, y, xo, zo = logits_of(None, *batch(torch.float32))
        leaves = [rows.requires_grad_() for rows in (x, z, xo, zo)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if style == "split":
                value = loss(x, w, z, y, xo, zo)
            else:
                rows, logits, labels = mixed(x, z, y, xo, zo)
                value = loss(rows, w, logits, labels)
        results.append([value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_features_autocast_is_a_cast(name, dtype):
    """Of features and head, before anything but the basis is formed of them."""
    x, w, b, y = batch(torch.float32)
    loss = build(name).eval()
    loss.from_features(x, w, b, y, N)  # a basis, where there is one
    with torch.autocast("cpu", dtype):
        found = loss.from_features(x, w, b, y, N)
    assert torch.equal(found, loss.from_features(x.to(dtype), w.to(dtype), b.to(dtype), y, N))


def test_an_energy_loss_has_its_own_parts():
    arguments = logits_of(None, *batch())
    _, parts = build("energy")(*arguments, return_parts=True)
    assert list(parts) == ["ce", "energy_in", "cluster", "energy_out", "separation"]
    _, expected = build("energy").outlier_loss(arguments[2], arguments[3], arguments[5], return_parts=True)
    assert all(torch.equal(parts[name], expected[name]) for name in expected)
