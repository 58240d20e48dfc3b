from __future__ import annotations

import itertools

import pytest
import torch
from judge import DEVICE, OPS, randn
from linear import derivatives, eager, head, oracle, ours, sizes
from oracle import assert_two_sided

from oodkern import reference
from oodkern.triton_kernels import linear_energy

SCORES = ("energy", "joint_energy")
DTYPES = (torch.float32, torch.float16)
# Under the interpreter tiles are 16 rows by 32 classes by 16 columns.
SHAPES = [(37, 70, 40), (3, 33, 17), (16, 32, 16), (1, 1, 1), (50, 5, 24)]
GPU = DEVICE == "cuda"


def same(a, b):
    """Bit for bit; on a GPU another layout may take another tile, which adds in another order."""
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-2 * GPU, atol=1e-5 * GPU, equal_nan=True)


@pytest.fixture(params=["splits", "one program"])
def schedule(request, monkeypatch):
    """Many programs for few rows, so that classes are split; or one that walks over all rows, and waves of a tile."""
    splits = request.param == "splits"
    monkeypatch.setattr(linear_energy, "processors", lambda device: 8 if splits else 1)
    if not splits:
        monkeypatch.setattr(linear_energy, "split_columns", lambda row_tiles, K, *_: (1, max(K, 1)))
        monkeypatch.setattr(linear_energy, "waves", lambda N, *_: [(i, min(i + 16, N)) for i in range(0, N, 16)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_value_and_derivatives_against_float64(score, dtype, shape, schedule):
    N, K, D = shape
    temperature = 0.7 if score == "energy" else 1.0
    inputs = [tensor for tensor in head(N, K, D, dtype, bias=D != 17) if tensor is not None]
    upstream = randn(N, seed=5)
    cotangents = [randn(*tensor.shape, dtype=dtype, seed=6 + i) for i, tensor in enumerate(inputs)]
    got = derivatives(ours(score, temperature), inputs, upstream, cotangents)
    exact = derivatives(oracle(score, temperature), [t.double() for t in inputs], upstream.double(), cotangents)
    yardstick = derivatives(eager(score, temperature), inputs, upstream, cotangents)
    condition, scales = sizes(score, temperature, inputs, upstream, cotangents)
    names = ["value", *"XWb"[: len(inputs)], "u", *(f"second {name}" for name in "XWb"[: len(inputs)])]
    for name, result, true, other, size in zip(names, got, exact, yardstick, scales, strict=True):
        assert result.dtype == (torch.float32 if name in ("value", "u") else dtype)
        # g p is rounded to 16 bits before it is multiplied: half a unit in the last place of each term.
        rounding = torch.finfo(dtype).eps / 2 / torch.finfo(torch.float32).eps if result.dtype == torch.float16 else 0.0
        of_matrix = {"condition": condition + rounding, "rows": result.dim() > 1, "size": size}
        assert_two_sided(result, true, other, name, **({"size": size} if name == "value" else of_matrix))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_of_the_gradients(dtype, wanted):
    x, w, b = head(20, 40, 24, dtype)
    grad, cotangents = randn(20, seed=5), [randn(*t.shape, dtype=dtype, seed=6) for t in (x, w, b)]
    score = SCORES[dtype == torch.float16]
    arguments = grad, x, w, b, OPS.linear_score(score, x, w, b, 2.0), 2.0
    whole = OPS.linear_score_backward(score, *arguments, True, True, True)
    some = OPS.linear_score_backward(score, *arguments, *wanted)
    u, *second = OPS.linear_score_double_backward(score, *cotangents, *arguments, True, True, True)
    same_u, *rest = OPS.linear_score_double_backward(score, *cotangents, *arguments, *wanted)
    same(same_u, u)
    for result, all_of_it, asked in zip((*some, *rest), (*whole, *second), wanted * 2, strict=True):
        same(result, all_of_it if asked else all_of_it.new_empty(0))


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_any_of_the_cotangents(score, given):
    """Without a cotangent: what zeros give."""
    x, w, b = head(20, 40, 24)
    cotangents = [randn(*t.shape, seed=6) for t in (x, w, b)]
    arguments = randn(20, seed=5), x, w, b, OPS.linear_score(score, x, w, b, 0.8), 0.8, True, True, True
    some = [t if here else None for t, here in zip(cotangents, given, strict=True)]
    zeros = [t if here else torch.zeros_like(t) for t, here in zip(cotangents, given, strict=True)]
    results = OPS.linear_score_double_backward(score, *some, *arguments)
    for a, e in zip(results, OPS.linear_score_double_backward(score, *zeros, *arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def test_scores(schedule):
    x, w, b = head(37, 70, 40)
    for exact, result in zip(reference.linear_scores(*head(37, 70, 40)), OPS.linear_scores(x, w, b), strict=True):
        assert result.dtype == exact.dtype
        torch.testing.assert_close(result, exact, rtol=2e-5, atol=2e-5)


def test_argmax_is_the_lowest_index_on_ties(schedule):
    x, w, _ = head(20, 70, 24)
    x[0] = x[0].mul(3).round()  # products of integers, the same whatever order they are added in
    w[40:44] = w[69] = w[33] = 5 * x[0]
    w[3] = w[60] = -5 * x[0]
    scores = OPS.linear_scores(torch.stack([x[0], -x[0], 0 * x[0]]), w, None)
    assert scores[3].tolist() == [33, 3, 0]


def test_infinite_and_nan_rows(schedule):
    x, w, b = head(20, 70, 24)
    w.abs_()
    clean = OPS.linear_scores(x, w, b)
    dirty = x.clone()
    dirty[3], dirty[9, 5], dirty[17] = -torch.inf, torch.nan, torch.inf
    others = [i for i in range(20) if i not in (3, 9, 17)]
    energy, joint, top, index, msp = OPS.linear_scores(dirty, w, b)
    for a, e in zip((energy, joint, top, index, msp), clean, strict=True):
        assert torch.equal(a[others], e[others])
    inf, nan = torch.inf, torch.nan
    expected = {0: [inf, nan, -inf], 1: [0.0, nan, inf], 2: [-inf, nan, inf]}
    for i, result in enumerate((energy, joint, top)):
        torch.testing.assert_close(result[[3, 9, 17]].tolist(), expected[i], equal_nan=True)
    assert msp[[3, 9, 17]].isnan().all()
    assert index[[3, 9, 17]].tolist() == [0, 0, 0]
    for score in SCORES:
        value, grad = OPS.linear_score(score, dirty, w, b, 1.0), randn(20, seed=5)
        gradient = OPS.linear_score_backward(score, grad, dirty, w, b, value, 1.0, True, False, False)[0]
        second = OPS.linear_score_double_backward(
            score, None, None, randn(70, seed=6), grad, dirty, w, b, value, 1.0, True, False, False
        )
        assert not gradient[3].any()
        assert not second[0][3].any()
        assert not second[1][3].any()
        assert gradient[9].isnan().all()
        assert gradient[others].isfinite().all()
        assert second[1][others].isfinite().all()


def test_bias_of_minus_infinity(schedule):
    """A class that cannot be counts for nothing; where none can be, E = +inf, J = 0 and gradients are zero."""
    x, w, b = head(20, 70, 24)
    b[[0, 31, 69]] = -torch.inf
    left = b.isfinite()
    for score in SCORES:
        value = OPS.linear_score(score, x, w, b, 1.0)
        torch.testing.assert_close(value, oracle(score, 1.0)(x, w[left], b[left]), rtol=1e-5, atol=1e-5)
        grad = randn(20, seed=5)
        for of_weight in OPS.linear_score_backward(score, grad, x, w, b, value, 1.0, True, True, True)[1:]:
            assert not of_weight[~left].any()
        nothing = torch.full_like(b, -torch.inf)
        value = OPS.linear_score(score, x, w, nothing, 1.0)
        assert (value == (torch.inf if score == "energy" else 0.0)).all()
        for gradient in OPS.linear_score_backward(score, grad, x, w, nothing, value, 1.0, True, True, True):
            assert not gradient.any()


@pytest.mark.parametrize("shape", [(0, 5, 4), (4, 0, 5), (4, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype, shape):
    N, K, D = shape
    x, w, b = head(N, K, D, dtype)
    for score in SCORES:
        value = OPS.linear_score(score, x, w, b, 1.0)
        torch.testing.assert_close(value, oracle(score, 1.0)(x, w, b))
        arguments = randn(N, seed=5), x, w, b, value, 1.0, True, True, True
        gradients = OPS.linear_score_backward(score, *arguments)
        assert [g.shape for g in gradients] == [x.shape, w.shape, b.shape]
        u, *second = OPS.linear_score_double_backward(score, x, w, b, *arguments)
        assert u.shape == (N,)
        assert [g.shape for g in second] == [x.shape, w.shape, b.shape]
        if N and K:
            expected = derivatives(oracle(score, 1.0), [x.float(), w.float(), b.float()], arguments[0], [x, w, b])
            torch.testing.assert_close(gradients[2].float(), expected[3], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(second[2].float(), expected[7], rtol=1e-3, atol=1e-4)
        else:
            assert not any(g.any() for g in (*gradients, u, *second))
    if K:
        assert [s.shape for s in OPS.linear_scores(x, w, b)] == [(N,)] * 5


def test_any_strides():
    wide = randn(60, 100, seed=3)
    w, b = randn(24, 33, seed=4).T, randn(66, seed=5)[::2]
    for features in (wide[::3, 7:31], wide[:1, :24].expand(20, 24), wide[:24, :20].T):
        grad = randn(1, seed=6).expand(20)
        results = []
        for tensors in ((features, w, b), (features.contiguous(), w.contiguous(), b.contiguous())):
            value = OPS.linear_score("energy", *tensors, 1.0)
            arguments = grad, *tensors, value, 1.0, True, True, True
            gradients = OPS.linear_score_backward("energy", *arguments)
            second = OPS.linear_score_double_backward("energy", *tensors, *arguments)
            results.append([value, *gradients, *second])
        for a, e in zip(*results, strict=True):
            same(a, e)


@pytest.mark.parametrize("score", SCORES)
def test_small_upstreams_do_not_underflow(score):
    """With a mean over 10^7 rows upstreams are 1e-7, where float16 has three numbers left."""
    inputs = head(20, 40, 24, torch.float16)
    upstream, large = 1e-7 * randn(20, seed=5), 1e3
    cotangents = [large * randn(*t.shape, seed=6, dtype=torch.float16) for t in inputs]
    value = OPS.linear_score(score, *inputs, 1.0)
    arguments = upstream * large, *inputs, value, 1.0, True, True, True
    reached = OPS.linear_score_backward(score, *arguments)
    exact = derivatives(oracle(score, 1.0), [t.double() for t in inputs], upstream.double() * large, cotangents)
    for result, true in zip(reached, exact[1:4], strict=True):
        assert (result.double() - true).abs().max() <= 1e-3 * true.abs().max() + 2.0**-24
    second = OPS.linear_score_double_backward(score, *cotangents, *arguments)
    for result, true in zip(second, exact[4:], strict=True):
        assert (result.double() - true).abs().max() <= 1e-3 * true.abs().max() + 2.0**-24


def test_a_row_that_is_not_finite_leaves_the_scale_alone():
    x, w, b = head(20, 40, 24, torch.float16)
    grad = randn(20, seed=5)
    clean = OPS.linear_score_backward("joint_energy", grad, x, w, b, grad, 1.0, True, False, False)[0]
    grad[4], grad[5] = torch.nan, torch.inf
    dirty = OPS.linear_score_backward("joint_energy", grad, x, w, b, grad, 1.0, True, False, False)[0]
    others = [i for i in range(20) if i not in (4, 5)]
    torch.testing.assert_close(dirty[others], clean[others], rtol=1e-3, atol=1e-5)
    assert dirty[4].isnan().all()


def test_joint_energy_of_very_negative_logits():
    x = torch.zeros(1, 1, device=DEVICE)
    b = torch.tensor([-80.0, -79.5, -60.0, -20.0, -3.0], device=DEVICE)
    for i in range(1, 6):
        value = OPS.linear_score("joint_energy", x, x.expand(i, 1), b[:i], 1.0)
        torch.testing.assert_close(value.double(), b[:i].double().exp().log1p().sum()[None], rtol=5e-6, atol=0)


def test_repeats_bit_for_bit(schedule):
    inputs = head(37, 70, 24, torch.float16)
    cotangents = [randn(*t.shape, seed=6, dtype=torch.float16) for t in inputs]
    results = [derivatives(ours("energy", 1.0), inputs, randn(37, seed=5), cotangents) for _ in range(2)]
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_autocast_and_grad_mode_do_not_reach_inside():
    x, w, b = head(20, 40, 24)
    grad, value = randn(20, seed=5), OPS.linear_score("energy", x, w, b, 1.0)
    expected = OPS.linear_score_backward("energy", grad, x, w, b, value, 1.0, True, True, True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        results = OPS.linear_score_backward("energy", grad, leaf, w, b, value, 1.0, True, True, True)
    for a, e in zip(results, expected, strict=True):
        assert torch.equal(a, e)


def test_float64_is_refused():
    x, w, _ = head(3, 4, 5, torch.float64)
    with pytest.raises(TypeError, match="features: Triton's kernels take float32, bfloat16, float16, got float64"):
        OPS.linear_score("energy", x, w, None, 1.0)
