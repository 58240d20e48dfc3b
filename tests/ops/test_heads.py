"""Room `heads`: its numbers."""

import itertools

import pytest
import torch
from bar_heads import HEADS, compare, labels, random, value_and_gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import FLOATS, layouts
from oracle import assert_two_sided, like

import oodkern
from oodkern import _native, reference

SHAPES = [(3, 5), (2, 3, 4), (1, 1), (7, 1), (4, 17), (5, 1024), (3, 1025), (3, 2500), (33, 1000), (9,)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("foresee", ["nothing", "itself", "another"])
def test_value_and_gradient_against_float64(head, dtype, foresee):
    for seed, shape in enumerate(SHAPES):
        compare(head, random(shape, dtype, seed), foresee)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", HEADS)
def test_every_instruction_set(head, dtype):
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            for foresee in ("nothing", "itself"):
                compare(head, random((33, 1300), dtype), foresee)


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout(head, data):
    compare(head, data.draw(layouts(extreme=False)), data.draw(st.sampled_from(("nothing", "itself", "another"))))


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_extreme_logits(head, data):
    """-inf, and logits as large as 1e4: the oracle's infinities, and no NaN."""
    z = data.draw(layouts(columns=(1, 7, 64, 1031)))
    function, oracle, _ = HEADS[head]
    upstream = like(z[..., 0].double())
    value, gradient = value_and_gradient(function, z, upstream)
    exact, slope = value_and_gradient(oracle, z.double(), upstream)
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=1e-5)
    tolerance = 2e-2 if z.dtype in FLOATS[2:] else 1e-4
    torch.testing.assert_close(gradient, slope.to(z.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", HEADS)
def test_blocks_of_a_row_differ_in_magnitude(head, dtype):
    z = random((6, 5000), torch.float64)
    for i, order in enumerate(itertools.permutations((-90.0, 0.0, 90.0))):
        z[i] += torch.tensor(order, dtype=torch.float64).repeat_interleave(1700)[:5000]
    compare(head, z.to(dtype))


def test_a_common_shift_of_the_logits_costs_no_accuracy():
    """logsumexp(z) - mean(z), each as large as the logits, is a difference of what lies about the maximum."""
    z = torch.randn(50, 3000).mul(64).round().div(64)
    torch.testing.assert_close(oodkern.oe_head(z + 4096), oodkern.oe_head(z), rtol=2e-6, atol=0)


class TestBinaryCrossEntropy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_labels_leave_nothing_to_cancel(self, dtype):
        """One logit and its label, entry by entry: also where softplus(z) - z and sigmoid(z) - 1 round to 0."""
        z = torch.linspace(-80, 80, 1601, dtype=dtype)[:, None]
        for name, label in itertools.product(_native.instruction_sets(), (0.0, 1.0)):
            y = torch.full_like(z, label)
            with _native.instruction_set(name):
                value, gradient = value_and_gradient(lambda t, y=y: oodkern.bce_head(t, y), z, torch.ones(1601))
            sign = 1 - 2 * label
            off = sign * z.double()
            exact = off.clamp_min(0) + (-off.abs()).exp().log1p()
            torch.testing.assert_close(value.double(), exact.squeeze(1), rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient.double(), sign * off.sigmoid(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_targets_of_every_dtype(self, dtype):
        """The same labels, whatever they are stored as, in any strides; fractions between 0 and 1 as well."""
        integers = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        for shape in ((5, 17), (4, 2100)):
            z, upstream = random(shape, dtype), like(torch.empty(shape[0]))
            first = value_and_gradient(lambda t: oodkern.bce_head(t, labels(t)), z, upstream)
            for kind in (*FLOATS, *integers):
                y = labels(z, kind)
                spread = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=kind)
                spread[..., ::2] = y
                for view in (y, y.T.contiguous().T, spread[..., ::2]):
                    again = value_and_gradient(lambda t, y=view: oodkern.bce_head(t, y), z, upstream)
                    assert all(map(torch.equal, first, again)), kind
            soft = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            for kind in FLOATS:
                y = soft.to(kind)
                value, gradient = value_and_gradient(lambda t, y=y: oodkern.bce_head(t, y), z, upstream)
                known = y.to(value.dtype).double()
                exact, slope = value_and_gradient(
                    lambda t, y=known: reference.bce_head(t, y), z.double(), upstream.double()
                )
                assert_two_sided(value, exact, exact)
                size = torch.full_like(slope, 1 / shape[-1]) * upstream.double().abs().unsqueeze(-1)
                assert_two_sided(gradient, slope, slope, "gradient", rows=True, size=size)

    def test_targets_expanded_over_rows(self):
        z, y = torch.randn(6, 9), labels(torch.empty(9))
        assert torch.equal(oodkern.bce_head(z, y.expand(6, 9)), oodkern.bce_head(z, y.repeat(6, 1)))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
class TestInfinities:
    @pytest.fixture(autouse=True)
    def demand(self, backend):
        with oodkern.backend(backend):
            yield

    def both(self, function, row, dtype):
        z = torch.tensor([row], dtype=dtype, requires_grad=True)
        value = function(z)
        return value.item(), torch.autograd.grad(value, z, torch.full_like(value, 0.5))[0][0].double()

    def test_minus_infinity(self, dtype, backend):
        inf = torch.inf
        value, gradient = self.both(oodkern.oe_head, [-inf, 1.0, 1.0], dtype)
        assert value == inf
        tolerance = {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(gradient, torch.tensor([-1 / 6, 1 / 12, 1 / 12]).double(), **tolerance)
        value, gradient = self.both(oodkern.oe_head, [-inf, -inf], dtype)
        assert value == inf
        torch.testing.assert_close(gradient, torch.tensor([-0.25, -0.25]).double(), **tolerance)
        for side, worth in (("in", inf), ("out", 0.0)):
            value, gradient = self.both(lambda z, s=side: oodkern.energy_head(z, 1.0, s), [-inf, -inf], dtype)
            assert value == worth
            assert (gradient == 0).all()
            value, gradient = self.both(lambda z, s=side: oodkern.energy_head(z, 1.0, s), [-inf, 2.0], dtype)
            assert value == pytest.approx(0.0 if side == "in" else 9.0)
            assert gradient[0] == 0
            assert gradient[1] == pytest.approx(0.0 if side == "in" else 3.0)

    def test_infinite_logits_and_their_labels(self, dtype, backend):
        def head(label):
            return lambda z: oodkern.bce_head(z, torch.tensor([[label, 0.0]]))

        inf, other = torch.inf, 0.5 * 0.6931471805599453
        for logit, label, worth in ((inf, 1.0, other), (-inf, 0.0, other), (inf, 0.0, inf), (-inf, 1.0, inf)):
            value, gradient = self.both(head(label), [logit, 0.0], dtype)
            assert value == pytest.approx(worth, rel=1e-6)
            assert gradient[1] == pytest.approx(0.125)
            if backend == "native":
                assert gradient[0] == pytest.approx(0.25 * ((logit > 0) - label))

    def test_nan_and_plus_infinity(self, dtype, backend):
        nan, inf = torch.nan, torch.inf
        z = torch.tensor([[0.0, 1.0], [nan, 1.0], [-inf, nan], [2.0, 1.0]], dtype=dtype)
        for function, _, _ in HEADS.values():
            assert function(z).isnan().tolist() == [False, True, True, False]
        z = torch.tensor([[inf, 1.0], [0.0, 1.0]], dtype=dtype)
        assert oodkern.oe_head(z).isnan().tolist() == [True, False]
        assert oodkern.energy_head(z, 0.0, "in").tolist()[0] == 0
        assert oodkern.energy_head(z, 0.0, "out").tolist()[0] == inf
