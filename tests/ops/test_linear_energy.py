"""Room `linear_energy`: what is special to it; the rest is the bar's."""

import math

import pytest
import torch
from bar_product import ProductBar
from bar_product_pytorch import ProductOp
from layouts import FLOATS
from oracle import like

import oodkern
from oodkern import reference


def head(N, D, K):
    return (N, D), (K, D), (K,)


# More rows than a wave has with any number of threads; more features than a block of a product is deep.
SHAPES = [head(5, 3, 4), head(7, 33, 12), head(4, 1, 1), head(64, 100, 257), head(300, 65, 1100), head(4200, 3, 5)]
SHAPES += [head(9, 1100, 6), head(33, 64, 100)]


def largest_logit(x, w, b=None):
    """Rounding E, as large as the logits and log K, moves E / T and with it every softmax of the row by that much; and
    logits are sums of D products."""
    z = reference.linear(x, w, b).detach()
    return float(z.abs().max() if z.numel() else 0) + math.log(max(len(w), 1)) + x.shape[1] ** 0.5


def eager_energy(x, w, b=None, temperature=1.0):
    return -temperature * torch.logsumexp(torch.nn.functional.linear(x, w, b).to(score_of(x)) / temperature, -1)


def eager_joint_energy(x, w, b=None):
    return torch.nn.functional.softplus(torch.nn.functional.linear(x, w, b).to(score_of(x))).sum(-1)


def score_of(x):
    return torch.promote_types(x.dtype, torch.float32)


def raw(score, temperature=1.0):
    """The arguments of the raw op and of its derivatives."""

    def forward(inputs):
        return (score, *inputs, temperature)

    def backward(inputs, needs=(True, True, True)):
        value = torch.ops.oodkern.linear_score(*forward(inputs))
        return (score, like(value), *inputs, value, temperature, *needs)

    def double_backward(inputs, given=(True, True, True)):
        cotangents = [like(t, seed=3) if g else None for t, g in zip(inputs, given, strict=True)]
        name, *rest = backward(inputs)
        return (name, *cotangents, *rest)

    return [
        ("linear_score", forward),
        ("linear_score_backward", backward),
        ("linear_score_backward", lambda inputs: backward(inputs, (False, True, False))),
        ("linear_score_double_backward", double_backward),
        ("linear_score_double_backward", lambda inputs: double_backward(inputs, (False, True, False))),
    ]


class TestLinearEnergy(ProductBar):
    op = ProductOp(
        oodkern.linear_energy,
        reference.linear_energy,
        eager_energy,
        SHAPES,
        make=head,
        scale=1.0,
        condition=largest_logit,
        raw_products=raw("energy"),
    )


class TestWithTemperatureAndWithoutBias(ProductBar):
    op = ProductOp(
        lambda x, w: oodkern.linear_energy(x, w, temperature=0.37),
        lambda x, w: reference.linear_energy(x, w, None, 0.37),
        lambda x, w: eager_energy(x, w, None, 0.37),
        [shapes[:2] for shapes in SHAPES],
        make=lambda N, D, K: head(N, D, K)[:2],
        scale=1.0,
        condition=lambda x, w: largest_logit(x, w) / 0.37,
    )


class TestLinearJointEnergy(ProductBar):
    op = ProductOp(
        oodkern.linear_joint_energy,
        reference.linear_joint_energy,
        eager_joint_energy,
        SHAPES,
        make=head,
        scale=1.0,
        condition=largest_logit,
        raw_products=raw("joint_energy"),
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
class TestEdges:
    @pytest.fixture(autouse=True)
    def demand(self, backend):
        with oodkern.backend(backend):
            yield

    def test_no_classes(self, dtype, backend):
        x, w = torch.randn(3, 4).to(dtype).requires_grad_(), torch.zeros(0, 4, dtype=dtype, requires_grad=True)
        energy, joint = oodkern.linear_energy(x, w), oodkern.linear_joint_energy(x, w)
        assert (energy == torch.inf).all()
        assert (joint == 0).all()
        for value in (energy, joint):
            for gradient, of in zip(torch.autograd.grad(value, (x, w), like(value)), (x, w), strict=True):
                assert gradient.shape == of.shape
                assert (gradient == 0).all()

    def test_no_features(self, dtype, backend):
        """Without features the bias is all there is."""
        x, w, b = torch.zeros(3, 0, dtype=dtype), torch.zeros(5, 0, dtype=dtype), torch.randn(5).to(dtype)
        torch.testing.assert_close(oodkern.linear_energy(x, w, b), oodkern.energy(b).expand(3))
        torch.testing.assert_close(oodkern.linear_energy(x, w), -torch.full((3,), 5.0).log().to(score_of(x)))

    def test_minus_infinity(self, dtype, backend):
        x, w = torch.randn(3, 4).to(dtype).requires_grad_(), torch.randn(5, 4).to(dtype)
        nothing = torch.full((5,), -torch.inf, dtype=dtype)
        energy = oodkern.linear_energy(x, w, nothing)
        assert (energy == torch.inf).all()
        (gradient,) = torch.autograd.grad(energy, x, like(energy))
        assert (gradient == 0).all()
        one = nothing.clone()
        one[2] = 0.5
        logit = reference.linear(x, w)[:, 2] + 0.5
        torch.testing.assert_close(oodkern.linear_energy(x, w, one), -logit, rtol=1e-5, atol=1e-5)
        assert (oodkern.linear_joint_energy(x, w, nothing) == 0).all()

    def test_the_first_nan_is_the_largest(self, dtype, backend):
        """As torch.argmax has it, in whichever slice of classes it is."""
        x, w = torch.randn(3, 4).to(dtype), torch.randn(2500, 4).to(dtype)
        for first in (700, 1400):
            w[first] = torch.nan
            w[2100] = torch.nan
            assert oodkern.linear_scores(x, w).argmax.tolist() == [first] * 3
            w[first] = 0
        assert oodkern.linear_scores(x * torch.nan, w).argmax.tolist() == [0] * 3

    def test_float64_stays_under_autocast(self, dtype, backend):
        x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
        expected = oodkern.linear_energy(x, w)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(oodkern.linear_energy(x, w), expected)

    def test_plus_infinity_and_nan_in_the_bias(self, dtype, backend):
        x, w = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
        b = torch.zeros(5, dtype=dtype)
        b[1] = torch.inf
        assert (oodkern.linear_energy(x, w, b) == -torch.inf).all()
        assert (oodkern.linear_joint_energy(x, w, b) == torch.inf).all()
        b[1] = torch.nan
        scores = oodkern.linear_scores(x, w, b)
        for score in (scores.energy, scores.joint_energy, scores.max_logit, scores.msp):
            assert score.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_scores_against_float64(dtype):
    for N, D, K in ((5, 3, 4), (0, 3, 4), (1, 1, 1), (300, 65, 1100), (700, 40, 2100)):
        x, w, b = (torch.randn(shape).to(dtype) for shape in head(N, D, K))
        scores = oodkern.linear_scores(x, w, b)
        exact = reference.linear_scores(x.double(), w.double(), b.double())
        tolerance = {
            "rtol": 1e-5 if dtype != torch.float64 else 1e-13,
            "atol": 2e-5 if dtype != torch.float64 else 1e-12,
        }
        for name, ours, oracle in zip(scores._fields, scores, exact, strict=True):
            if name != "argmax":
                assert ours.dtype == score_of(x)
                torch.testing.assert_close(ours.double(), oracle, **tolerance)
        z = reference.linear(x.double(), w.double(), b.double())
        # Two logits that agree to rounding may change places.
        picked = z.gather(1, scores.argmax[:, None]).squeeze(1)
        torch.testing.assert_close(picked, exact[2], **tolerance)
        # One reduction or several at once: what differs is the order in which a row's exponentials are added up.
        rounding = 4 * torch.finfo(score_of(x)).eps
        torch.testing.assert_close(scores.energy, oodkern.linear_energy(x, w, b), rtol=rounding, atol=rounding)


def test_argmax_is_the_first_of_equals():
    x = torch.ones(3, 4)
    w = torch.ones(2500, 4)
    w[:7] = -1
    assert oodkern.linear_scores(x, w).argmax.tolist() == [7, 7, 7]


def test_linear_scores_is_one_pass():
    """Five scores cost the multiply-adds of one product; gradients those of their formula."""
    count = torch.ops.oodkern.multiplications
    N, D, K = 300, 20, 50
    x, w, b = (torch.randn(shape, requires_grad=True) for shape in head(N, D, K))
    product = N * D * K

    def products_of(work):
        before = count()
        result = work()
        return (count() - before) / product, result

    assert products_of(lambda: oodkern.linear_scores(x, w, b))[0] == 1
    forward, value = products_of(lambda: oodkern.linear_energy(x, w, b))
    assert forward == 1
    g = like(value).requires_grad_()
    # One product a gradient that has rows, of the logits that are there still; of features alone it is there already.
    for wanted, expected in (((x,), 0), ((w,), 1), ((b,), 0), ((x, w, b), 2)):
        leaves = [t.detach().requires_grad_(any(t is other for other in wanted)) for t in (x, w, b)]
        again = oodkern.linear_energy(*leaves)
        to = [leaf for leaf in leaves if leaf.requires_grad]
        assert products_of(lambda again=again, to=to: torch.autograd.grad(again, to, g.detach()))[0] == expected
    gradients = torch.autograd.grad(value, (x, w, b), g, create_graph=True)
    # z, two of t, then two each for features and weight.
    cotangents = [like(gradient) for gradient in gradients]
    assert products_of(lambda: torch.autograd.grad(gradients, (g, x, w, b), cotangents, retain_graph=True))[0] == 7
    alone = x.detach().requires_grad_()
    value = oodkern.linear_energy(alone, w.detach(), b.detach())
    (only,) = torch.autograd.grad(value, alone, g, create_graph=True)
    assert products_of(lambda: torch.autograd.grad(only, alone, like(only)))[0] == 3  # z, t and the gradient


@pytest.mark.parametrize(("N", "products"), [(40, 4), (1500, 5)])
def test_sums_that_do_not_fit_are_gone_through_by_class(N, products):
    """16-bit weights of 9 MB: their float32 sums would not leave room for tiles, so waves form theirs twice."""
    x, w = (torch.randn(N, 700) * 0.1).half().requires_grad_(), (torch.randn(6500, 700) * 0.1).half().requires_grad_()
    before = torch.ops.oodkern.multiplications()
    value = oodkern.linear_energy(x, w)
    g = like(value)
    dx, dw = torch.autograd.grad(value, (x, w), g, create_graph=True)
    assert torch.ops.oodkern.multiplications() - before == products * N * 700 * 6500
    z = (x.detach().double() @ w.detach().double().T).requires_grad_()
    (p,) = torch.autograd.grad(reference.energy(z), z, g.double())
    for ours, exact in ((dx, p @ w.detach().double()), (dw, p.T @ x.detach().double())):
        assert ((ours.double() - exact).abs() <= 1e-3 * exact.abs() + 1e-7).all()
    second = torch.autograd.grad((dx, dw), (x, w), (like(dx), like(dw)))
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    first = torch.autograd.grad(reference.linear_energy(*leaves), leaves, g.double(), create_graph=True)
    exact = torch.autograd.grad(first, leaves, (like(dx).double(), like(dw).double()))
    for ours, oracle in zip(second, exact, strict=True):
        assert ((ours.double() - oracle).abs().max() / oracle.abs().max()) < 1e-3


def test_mean_reductions_over_many_rows_do_not_underflow():
    """An upstream of 1e-7 is under float16's smallest normal number; the weight's gradient is not."""
    x, w = (torch.randn(2000, 16) + 1).half(), torch.randn(8, 16).half().requires_grad_()
    (gradient,) = torch.autograd.grad(oodkern.linear_energy(x, w), w, torch.full((2000,), 1e-7))
    leaf = w.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_energy(x.double(), leaf), leaf, torch.full((2000,), 1e-7).double())
    assert ((gradient.double() - exact).abs() <= 1e-3 * exact.abs() + 6e-8).all()


def test_workspace_of_wide_sixteen_bit_features():
    """Features, cotangents and sums are widened by the wave: all of it counts."""
    bar = TestLinearEnergy()
    held = bar._held([t.requires_grad_() for t in bar.op.inputs(head(3000, 1024, 1200), torch.float16)])
    assert max(held) <= 16 << 20, held


@pytest.mark.parametrize("shapes", [((3, 0, 4), (5, 4)), ((3, 2, 0), (5, 0)), ((3, 2, 4), (0, 4))])
@pytest.mark.parametrize("function", [oodkern.linear_energy, oodkern.alignment])
def test_vmap_of_nothing(function, shapes):
    """Batches of no rows, no features, no classes."""
    x, w = (torch.randn(shape) for shape in shapes)
    gradient = torch.func.vmap(torch.func.grad(lambda x, w: function(x, w).sum()), in_dims=(0, None))(x, w)
    assert gradient.shape == x.shape
    assert (gradient == 0).all()
