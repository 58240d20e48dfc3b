"""What CLUB is judged by on CUDA, in the emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import like, value_and_gradients
from pairs import judge_club, same
from torch import Tensor

import oodkern
from oodkern import reference

# A lane's vector of columns, a warp's of every storage, and one more; a row, a slice of rows, and several.
SIZES = [(2, 1), (5, 3), (33, 8), (9, 64), (7, 257), (40, 130), (270, 5), (130, 33)]


def inputs(N: int, D: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in same(N, D)]


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    for N, D in ((3, 5), (70, 40)):
        value_and_gradients(through(oodkern.club), inputs(N, D, torch.float32))


class ClubCases:
    function = staticmethod(oodkern.club)

    @pytest.fixture(params=["float64", "float32", "bfloat16", "float16"])
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return getattr(torch, request.param)

    def judge(self, tensors: list[Tensor]) -> None:
        judge_club(tensors, self.function)

    def test_against_float64(self, dtype: torch.dtype) -> None:
        for seed, (N, D) in enumerate(SIZES):
            self.judge(inputs(N, D, dtype, seed))

    @pytest.mark.parametrize("offset", [1e3, -3e4, 1e6])
    def test_far_from_zero(self, dtype: torch.dtype, offset: float) -> None:
        if dtype == torch.float16:
            offset = 2e3
        for N, D in ((5, 3), (200, 20)):
            mean, log_variance, target = inputs(N, D, torch.float64)
            self.judge([(mean + offset).to(dtype), log_variance.to(dtype), (target + offset).to(dtype)])

    def test_slices_of_different_means(self, dtype: torch.dtype) -> None:
        """Sorted rows, columns of different means, and a first row that is far from the others."""
        mean, log_variance, target = inputs(250, 20, torch.float64)
        rows = torch.linspace(-40, 40, 250, dtype=torch.float64)[:, None]
        columns = torch.linspace(-900, 900, 20, dtype=torch.float64)
        far = target.clone()
        far[0] += 1e3
        for tensors in (
            (mean, log_variance, target + rows),
            (mean + rows, log_variance, target + rows),
            (mean + columns, log_variance, target + columns),
            (mean, log_variance, far),
        ):
            self.judge([tensor.to(dtype) for tensor in tensors])

    def test_large_and_small_variances(self, dtype: torch.dtype) -> None:
        mean, log_variance, target = inputs(40, 20, torch.float64)
        self.judge([mean.to(dtype), (log_variance * 10).to(dtype), target.to(dtype)])

    def test_alignments(self, dtype: torch.dtype) -> None:
        """Every input where it pleases, some rows at multiples of 16 bytes and some not."""
        bases = inputs(9, 60, dtype)
        for D, offsets in ((40, (0, 1, 8)), (37, (3, 0, 4)), (33, (7, 2, 0))):
            self.judge([base[:, first : first + D] for base, first in zip(bases, offsets, strict=True)])

    def test_layouts(self, dtype: torch.dtype) -> None:
        """Rows that share memory, that are every other one, that are columns."""
        a, b, c = inputs(18, 18, dtype)
        self.judge([a[:1].expand(9, 18), b[::2], c[:, :9].T])
        self.judge([a[::2], b[:1].expand(9, 18), c[:1].expand(9, 18)])
        self.judge([a[:, :1].expand(18, 7), b[:, ::2][:, :7], c[:, 1:8]])

    def test_empty(self, dtype: torch.dtype) -> None:
        for shape in ((0, 4), (3, 0), (0, 0)):
            leaves = [torch.empty(shape, dtype=dtype).requires_grad_() for _ in range(3)]
            value = self.function(*leaves)
            assert value == 0
            for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
                assert (gradient.shape, gradient.dtype) == (shape, leaf.dtype)

    def test_gradcheck(self) -> None:
        leaves = [tensor.requires_grad_() for tensor in inputs(4, 3, torch.float64)]
        assert torch.autograd.gradcheck(self.function, leaves)

    def test_any_subset_requires_gradients(self) -> None:
        tensors = inputs(20, 12, torch.float32)
        full = value_and_gradients(self.function, tensors)
        for i in range(1, 7):
            leaves = [t.clone().requires_grad_(bool(i >> k & 1)) for k, t in enumerate(tensors)]
            value = self.function(*leaves)
            wanted = [k for k in range(3) if leaves[k].requires_grad]
            gradients = torch.autograd.grad(value, [leaves[k] for k in wanted], like(value))
            assert all(torch.equal(g, full[1 + k]) for g, k in zip(gradients, wanted, strict=True))

    def test_nan_reaches_the_value_and_its_column(self) -> None:
        tensors = inputs(50, 70, torch.float32)
        clean = value_and_gradients(self.function, tensors)
        others = torch.arange(70) != 66
        for which in range(3):
            dirty = [t.clone() for t in tensors]
            dirty[which][47, 66] = torch.nan
            results = value_and_gradients(self.function, dirty)
            assert results[0].isnan()
            assert results[1 + (which != 2)][:, 66].isnan().any()
            for a, b in zip(results[1:], clean[1:], strict=True):
                assert torch.equal(a[:, others], b[:, others])

    def test_weights_at_the_ends_of_their_range(self) -> None:
        mean, target = torch.ones(2, 1), torch.tensor([[3.0], [1.0]])
        for log_variance, kind in (
            (-torch.inf, "infinite"),
            (torch.inf, "zero"),
            (200.0, "zero"),
            (-200.0, "infinite"),
        ):
            tensors = [mean, torch.full((2, 1), log_variance), target]
            value, *gradients = value_and_gradients(self.function, tensors)
            if kind == "zero":
                assert abs(value.item()) < 1e-37
                assert all((gradient.abs() < 1e-37).all() for gradient in gradients)
            else:
                assert not value.isfinite()

    def test_repeats_bit_for_bit(self, dtype: torch.dtype) -> None:
        tensors = inputs(150, 40, dtype)
        first = value_and_gradients(self.function, tensors)
        for a, b in zip(value_and_gradients(self.function, tensors), first, strict=True):
            assert torch.equal(a, b)

    def test_dtypes_and_reference(self, dtype: torch.dtype) -> None:
        tensors = inputs(12, 5, dtype)
        value, *gradients = value_and_gradients(self.function, tensors)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert {gradient.dtype for gradient in gradients} == {dtype}
        torch.testing.assert_close(value.double(), reference.club(*[t.double() for t in tensors]), rtol=1e-4, atol=1e-6)
