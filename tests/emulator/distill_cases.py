"""What room `distill` is judged by on CUDA, in the emulator and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from layouts import FLOATS
from oracle import like, value_and_gradients
from room_distill import MIXED, compare, pair

import oodkern
from oodkern import reference

# A vector and 8 lanes' worth, 32 lanes', a block's, what is read twice; and one more, or one less.
SHAPES = [(3, 5), (2, 3, 4), (1, 1), (7, 1), (35, 10), (9, 64), (3, 65), (5, 250), (3, 1000), (3, 1024), (3, 1025)]
SHAPES += [
    (2, 5000),
    (2, 8192),
    (1, 8193),
    (1, 20_000),
    (9,),
    (3, 63),
    (1, 65),
    (3, 511),
    (1, 513),
    (3, 1023),
    (1, 1025),
]


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    function = through(oodkern.distillation)
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for shape in ((3, 5), (2, 1000), (2, 9000)):
            teacher = torch.zeros(shape, dtype=dtypes[1])
            value_and_gradients(lambda s, t=teacher: function(s, t), [torch.zeros(shape, dtype=dtypes[0])])


class DistillBar:
    """Inherit, and set `function`: oodkern.distillation of tensors on the CPU, by the kernels under test."""

    function: Callable

    @pytest.mark.parametrize("dtypes", MIXED, ids=str)
    def test_value_and_gradient_against_float64(self, dtypes):
        for seed, shape in enumerate(SHAPES):
            for temperature in (1.0, 0.37) if shape[-1] < 1000 else (4.0,):
                compare(*pair(shape, dtypes, seed), temperature, self.function)

    @pytest.mark.parametrize("dtypes", MIXED, ids=str)
    def test_every_layout(self, dtypes):
        for cut in (
            lambda x: x[:, :, ::2],
            lambda x: x[::2],
            lambda x: x.transpose(0, 1),
            lambda x: x[1:, 2:, 3:],
            lambda x: x[:1].expand(5, 9, 34),
            lambda x: x[..., :1].expand(6, 9, 7),
        ):
            student, teacher = map(cut, pair((6, 9, 34), dtypes))
            compare(student, teacher, 1.3, self.function)
            compare(student, teacher.contiguous(), 1.3, self.function)

    @pytest.mark.parametrize("dtypes", MIXED, ids=str)
    def test_every_alignment(self, dtypes):
        """Of both rows, from one multiple of 16 bytes to the next."""
        for K in (13, 250, 1100):
            student, teacher = pair((3, K + 24), dtypes)
            for i, (a, b) in enumerate(itertools.product(range(0, 9, 3), (0, 1, 4, 5, 8))):
                if K == 13 or i % 4 == K % 3:
                    compare(student[:, a : a + K], teacher[:, b : b + K], 2.0, self.function)

    @pytest.mark.parametrize("dtypes", MIXED[:4], ids=str)
    def test_empty_and_single(self, dtypes):
        for shape in ((0, 5), (0, 0), (3, 0), (1, 1), (1, 5), (4, 0, 5), (5,), (1,)):
            student, teacher = pair(shape, dtypes)
            student.requires_grad_()
            value = self.function(student, teacher)
            assert value.shape == shape[:-1]
            (gradient,) = torch.autograd.grad(value, student, like(value))
            assert gradient.shape == shape
            exact = reference.distillation(student.detach().double(), teacher.double())
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)

    def test_gradcheck(self):
        student, teacher = pair((2, 3, 4), (torch.float64, torch.float64))
        assert torch.autograd.gradcheck(lambda s: self.function(s, teacher, 2.5), [student.requires_grad_()])

    def test_upstream_of_stride_0(self):
        student, teacher = pair((6, 40), (torch.float32, torch.float32))
        student.requires_grad_()
        value = self.function(student, teacher)
        upstreams = [torch.tensor(0.7).expand(6), torch.tensor(0.7).expand(6).contiguous()]
        assert torch.equal(*[torch.autograd.grad(value, student, g, retain_graph=True)[0] for g in upstreams])

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_parts_of_a_row_differ_in_magnitude(self, dtype):
        """Each part of a row may hold the largest, and is read again where there are several."""
        student, teacher = pair((6, 20_000), (torch.float64, torch.float64))
        for i, order in enumerate(itertools.permutations((-20.0, 0.0, 20.0))):
            steps = torch.tensor(order, dtype=torch.float64).repeat_interleave(6700)[:20_000]
            student[i] += steps
            teacher[i] += steps.roll(20_000 // (i + 1))
        compare(student.to(dtype), teacher.to(dtype), function=self.function)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_equal_rows_give_exactly_zero(self, dtype):
        for shape, scale in itertools.product(((5, 10), (3, 1000), (2, 9000)), (1.0, 1000.0)):
            (teacher,) = pair(shape, (dtype,), scale=scale)
            student = teacher.clone().requires_grad_()
            value = self.function(student, teacher, 0.7)
            assert (value == 0).all()
            assert (torch.autograd.grad(value, student, like(value))[0] == 0).all()

    @pytest.mark.parametrize("step", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
    def test_relative_accuracy_near_equality(self, step):
        """A rounding of u = log(p / q), of 2e-7 for shares down to e^-10 or so, moves p u^2 / 2 by that over u."""
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(20, 1000, generator=generator) * 2
        student = teacher + step * torch.randn(20, 1000, generator=generator)
        ours = self.function(student, teacher).double()
        exact = reference.distillation(student.double(), teacher.double())
        assert ((ours - exact).abs() / exact).max() < 1e-6 + 4e-7 / step

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("K", [3, 100, 9000])
    def test_infinities(self, dtype, K):
        inf = torch.inf
        fine, nothing = torch.linspace(-1, 1, K, dtype=torch.float64).to(dtype), torch.full((K,), -inf, dtype=dtype)
        without_last, nan, above = fine.clone(), fine.clone(), fine.clone()
        without_last[-1], nan[-1], above[0] = -inf, torch.nan, inf
        student = torch.stack([fine, fine, without_last, without_last, nothing, fine, nan, fine, above, fine, nothing])
        teacher = torch.stack(
            [fine.flip(0), without_last, without_last, fine, fine, nothing, fine, nan, fine, above, nothing]
        )
        student.requires_grad_()
        value = self.function(student, teacher)
        (gradient,) = torch.autograd.grad(value, student, torch.full_like(value, 0.7))
        exact = reference.distillation(student.detach().double(), teacher.double())
        assert value.isnan().tolist() == [False] * 6 + [True] * 4 + [False]
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert value[[3, 4]].tolist() == [inf, inf]
        assert value[[2, 5, 10]].tolist() == [0, 0, 0]
        assert (gradient[[2, 5, 10]] == 0).all()
        assert gradient[:3].isfinite().all()
        if K > 3:
            assert gradient[1, -1] >= 0
