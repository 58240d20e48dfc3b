"""What room `norm` is judged by on CUDA, in the emulator and on a GPU, beside the bar's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from energy_cases import SHAPES, CudaBar
from op import Op
from oracle import assert_two_sided, in_float64, like, value_and_gradients
from room_norm import eager_norm, over_last

import oodkern
from oodkern import reference


def norm_op(through: Callable = lambda function: function) -> Op:
    return Op(through(over_last(oodkern.sample_norm)), over_last(reference.sample_norm), eager_norm, SHAPES)


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    """Of the row engine, by its third reducer."""
    for shape in ((3, 5), (2, 1000), (2, 200_000)):
        value_and_gradients(through(oodkern.sample_norm), [torch.zeros(shape)], order=2)


# Sizes of elements whose squares leave the range of their dtype's arithmetic.
SIZES = {
    torch.float32: (1e-44, 1e-38, 1e-30, 1e-20, 1e18, 1e30, 3e37, 1e38),
    torch.bfloat16: (1e-38, 1e-30, 1e18, 1e30, 3e37, 1e38),
    torch.float64: (1e-300, 1e-170, 1e-154, 1e-140, 1e149, 1e153, 1e160, 1e306, 5e307),
    torch.float16: (6e-8, 1e-5, 6e4),
}


class NormBar(CudaBar):
    def test_zero_at_zero(self, dtype):
        for K in (5, 300, 1500):
            x = like(torch.empty(3, K, dtype=dtype))
            x[1] = 0
            value, *derivatives = value_and_gradients(self.op.function, [x], order=2)
            assert value[1] == 0
            for derivative in derivatives:
                assert (derivative[1] == 0).all()
                assert (derivative[0] != 0).any()
                assert derivative.isfinite().all()

    @pytest.mark.parametrize("columns", [40, 900, 9000])
    def test_squares_leave_the_range_and_norms_do_not(self, dtype, columns):
        """In the registers of a warp, and over several blocks whose parts of a row differ in size as well."""
        scale = torch.tensor(SIZES[dtype], dtype=torch.float64)[:, None]
        x = torch.zeros(len(scale), columns, dtype=torch.float64)
        x[:, :: columns // 10] = like(x[:, :: columns // 10]).clamp(-1, 1) * scale
        x = x.to(dtype)
        scaled = x.double() / scale  # within range
        norm, gradient = value_and_gradients(self.op.function, [x])
        exact = scaled.norm(dim=1) * scale.squeeze(1)
        assert_two_sided(norm, exact, exact)
        usual = norm >= torch.finfo(norm.dtype).tiny  # a norm with few bits left is exact to those
        assert usual.sum() >= len(scale) - 1
        direction = like(norm).double()[:, None] * scaled / scaled.norm(dim=1, keepdim=True)
        assert_two_sided(gradient[usual], direction[usual], direction[usual], rows=True)

    def test_parts_of_a_row_differ_in_size(self):
        """Each part of a row may be the one whose power of 2 the others are brought to."""
        for K in (1000, 5000):
            x = like(torch.empty(6, K, dtype=torch.float64))
            for row, order in enumerate(
                ((-30, 0, 30), (30, 0, -30), (0, 30, -30), (0, -30, 30), (60, 60, 0), (0, 0, 0))
            ):
                for part, size in enumerate(order):
                    x[row, part * K // 3 : (part + 1) * K // 3] *= 2.0**size
            x = x.float()
            norm, gradient = value_and_gradients(self.op.function, [x])
            exact, slopes = in_float64(self.op.reference, [x])
            assert_two_sided(norm, exact, exact)
            assert_two_sided(gradient, slopes, slopes, rows=True)

    def test_second_derivative_of_small_and_large_rows(self):
        """||s x|| has second derivative 1 / s that of ||x||."""
        for K in (50, 2000):
            x = like(torch.empty(1, K), seed=5)
            _, gradient, of_upstream, second = value_and_gradients(self.op.function, [x], order=2)
            for scale in (2.0**-60, 2.0**60):
                _, a, b, c = value_and_gradients(self.op.function, [x * scale], order=2)
                for ours, expected in ((a, gradient), (b, of_upstream), (c, second / scale)):
                    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)

    def test_infinities(self, dtype):
        for K in (2, 1500):
            x = torch.zeros(4, K, dtype=dtype)
            for row, ends in enumerate(((torch.inf, 1.0), (-torch.inf, torch.inf), (torch.inf, torch.nan), (1.0, 0.0))):
                x[row, 0], x[row, -1] = ends
            norm = self.op.function(x)
            assert norm[:2].isinf().all()
            assert norm[2].isnan()
            assert norm[3] == 1

    def test_few_long_rows(self):
        """Samples as long as images, a row shared by several blocks."""
        for x in (like(torch.empty(2, 150_528)), like(torch.empty(1, 70_001)).bfloat16()):
            self.compare([x], order=2)
