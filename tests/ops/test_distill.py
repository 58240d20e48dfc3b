"""Room `distill`: the divergence of a student from a teacher."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import FLOATS, layouts
from oracle import like
from room_distill import MIXED, SHAPES, compare, eager, pair

import oodkern
from oodkern import _native, reference


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_value_and_gradient_against_float64(dtypes):
    for seed, shape in enumerate(SHAPES):
        for temperature in (1.0, 0.37, 4.0):
            compare(*pair(shape, dtypes, seed), temperature)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(dtype):
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            compare(*pair((33, 1000), (dtype, dtype)), 2.0)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layout(data):
    student = data.draw(layouts(extreme=False))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kind = data.draw(st.sampled_from(("dense", "transposed", "sliced", "expanded")))
    dtype = student.dtype if student.dtype == torch.float64 else data.draw(st.sampled_from(FLOATS[1:]))

    def random(*shape):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)

    *lead, K = student.shape
    teacher = {
        "dense": lambda: random(*lead, K),
        "transposed": lambda: random(K, *lead).movedim(0, -1),
        "sliced": lambda: random(*lead, 2 * K + 1)[..., 1::2],
        "expanded": lambda: random(K).expand(*lead, K),
    }[kind]()
    compare(student, teacher, data.draw(st.sampled_from((1.0, 0.5, 3.0))))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_extreme_logits(data):
    """Infinities, and shares that underflow, in both rows: never NaN, never negative, and the oracle's infinities."""
    student = data.draw(layouts(columns=(1, 7, 64, 1031)))
    teacher = data.draw(st.sampled_from((student.flip(-1), student.roll(1, -1), student * 0.5, student)))
    ours = oodkern.distillation(student, teacher)
    assert (ours >= 0).all()
    # Logits are as large as 6e4, and u errs by a rounding of their differences.
    agree = {"rtol": 3e-6, "atol": 1e-12}
    wide = teacher.double()
    right = torch.isclose(ours.double(), reference.distillation(student.double(), wide), **agree)
    if student.dtype != torch.float64:  # shares below the smallest normal number may be 0: +inf beside -inf otherwise
        low = wide - wide.nan_to_num(-torch.inf).amax(-1, keepdim=True) < -125 * math.log(2)
        wide = wide.masked_fill(low, -torch.inf)
        right |= torch.isclose(ours.double(), reference.distillation(student.double(), wide), **agree)
    assert right.all()


def test_subnormal_shares_are_zero_to_every_instruction_set():
    """2^-127 and less of the largest; what they are worth shows beside a student's -inf."""
    student = torch.tensor([-torch.inf, 0.0, 1.0])
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            for exponent, infinite in ((-100, True), (-125, True), (-127, False), (-140, False), (-160, False)):
                teacher = torch.tensor([exponent * math.log(2), 0.0, 0.0])
                assert oodkern.distillation(student, teacher).isinf() == infinite, (name, exponent)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_a_whole_block_of_masked_classes(dtype, which):
    """Beside logits that are low, whose exponentials without a pivot are 0."""
    student, teacher = (z - 500 for z in pair((3, 2500), (torch.float64, torch.float64)))
    for z in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[which]:
        z[:, :1024] = -torch.inf
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    value = oodkern.distillation(student, teacher, 0.5)
    exact = reference.distillation(student.detach().double(), teacher.double(), 0.5)
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-4, atol=1e-6)
    assert not torch.autograd.grad(value, student, torch.ones_like(value))[0].isnan().any()


def test_blocks_of_a_row_differ_in_magnitude():
    for dtype in FLOATS:
        student, teacher = pair((6, 5000), (torch.float64, torch.float64))
        for i, order in enumerate(itertools.permutations((-20.0, 0.0, 20.0))):
            steps = torch.tensor(order, dtype=torch.float64).repeat_interleave(1700)[:5000]
            student[i] += steps
            teacher[i] += steps.roll(5000 // (i + 1))
        compare(student.to(dtype), teacher.to(dtype))


class TestNearEquality:
    """Where sum p log(p / q) as written cancels."""

    @pytest.mark.parametrize("dtypes", [pair for pair in MIXED if pair[0] == pair[1]], ids=str)
    def test_equal_rows_give_exactly_zero(self, dtypes):
        for shape, scale in itertools.product(SHAPES, (1.0, 30.0, 1000.0)):
            (teacher, _) = pair(shape, dtypes, scale=scale)
            student = teacher.clone().requires_grad_()
            value = oodkern.distillation(student, teacher, 0.7)
            assert (value == 0).all()
            assert (torch.autograd.grad(value, student, like(value))[0] == 0).all()

    @pytest.mark.parametrize("step", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
    def test_relative_accuracy(self, step):
        """A rounding of u = log(p / q), of 2e-7 for shares down to e^-10 or so, moves p u^2 / 2 by that over u."""
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(200, 1000, generator=generator) * 2
        student = teacher + step * torch.randn(200, 1000, generator=generator)
        ours = oodkern.distillation(student, teacher).double()
        exact = reference.distillation(student.double(), teacher.double())
        assert ((ours - exact).abs() / exact).max() < 1e-6 + 4e-7 / step
        # As written the error is that of the terms, whatever their sum comes to.
        written = eager(student, teacher).double()
        if step <= 1e-3:
            assert ((written - exact).abs() / exact).max() > 10 * ((ours - exact).abs() / exact).max()

    def test_a_shift_of_a_row_does_not_matter(self):
        teacher = torch.randn(50, 300)
        assert (oodkern.distillation(teacher + 4096.0, (teacher + 4096.0) - 4096.0) < 1e-12).all()

    def test_both_sides_of_the_series(self):
        """|u| = 1 is where the terms change their form: two classes, u swept through it."""
        student = torch.stack([torch.linspace(-6, 6, 4801), torch.zeros(4801)], -1)
        for name in _native.instruction_sets():
            with _native.instruction_set(name):
                ours = oodkern.distillation(student, torch.zeros_like(student)).double()
            exact = reference.distillation(student.double(), torch.zeros(4801, 2, dtype=torch.float64))
            assert ((ours - exact).abs() <= 2e-6 * exact + 1e-12).all(), name


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
class TestInfinities:
    @pytest.fixture(autouse=True)
    def demand(self, backend):
        with oodkern.backend(backend):
            yield

    def both(self, student, teacher, dtype):
        s = torch.tensor([student], dtype=dtype, requires_grad=True)
        value = oodkern.distillation(s, torch.tensor([teacher], dtype=dtype))
        (gradient,) = torch.autograd.grad(value, s, torch.full_like(value, 0.7))
        return value.item(), gradient[0]

    def test_teacher_gives_a_class_nothing(self, dtype, backend):
        inf = torch.inf
        expected, slope = self.both([0.5, 1.0], [2.0, 1.0], dtype)
        for hidden in (-inf, -60.0 if dtype != torch.float64 else -900.0):
            value, gradient = self.both([0.5, 1.0, -inf], [2.0, 1.0, hidden], dtype)
            if hidden == -inf:  # in both: as if it were not there
                assert value == pytest.approx(expected, rel=1e-6)
                torch.testing.assert_close(gradient[:2], slope)
                assert gradient[2] == 0
        value, gradient = self.both([0.5, 1.0, 0.25], [2.0, 1.0, -inf], dtype)
        exact = torch.tensor([0.5, 1.0, 0.25]).double().log_softmax(-1)[:2]
        p = torch.tensor([2.0, 1.0]).double().softmax(-1)
        assert value == pytest.approx(float((p * (p.log() - exact)).sum()), rel=1e-6)
        assert gradient.isfinite().all()
        assert gradient[2] > 0

    def test_student_gives_a_class_nothing(self, dtype, backend):
        assert self.both([0.5, -torch.inf], [2.0, 1.0], dtype)[0] == torch.inf
        assert self.both([-torch.inf, -torch.inf], [2.0, 1.0], dtype)[0] == torch.inf

    def test_rows_of_minus_infinity(self, dtype, backend):
        nothing = [-torch.inf] * 3
        for student in ([1.0, 2.0, 3.0], nothing, [1.0, -torch.inf, 0.0]):
            value, gradient = self.both(student, nothing, dtype)
            assert value == 0
            assert (gradient == 0).all()

    def test_plus_infinity_and_nan(self, dtype, backend):
        fine = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        for bad in ([torch.inf, 0.0, 1.0], [torch.nan, 0.0, 1.0], [-torch.inf, torch.nan, -torch.inf]):
            bad = torch.tensor(bad, dtype=dtype)
            s, t = torch.stack([fine, bad, fine, bad]), torch.stack([fine.flip(0), fine, bad, bad])
            assert oodkern.distillation(s, t).isnan().tolist() == [False, True, True, True]
        nan, nothing = torch.tensor([[torch.nan, 0.0]], dtype=dtype), torch.full((1, 2), -torch.inf, dtype=dtype)
        if backend == "native":
            assert oodkern.distillation(nan, nothing).isnan().all()

    def test_large_logits(self, dtype, backend):
        limit = torch.finfo(dtype).max / 4
        value, gradient = self.both([limit, -limit, 0.0], [limit, -limit, 0.0], dtype)
        assert value == 0
        assert (gradient == 0).all()
