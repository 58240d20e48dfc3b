"""The bar that every op has to pass, in one place.

A room describes its op once (`Op`) and inherits from `OpBar`; its test file then holds only what is special to it.
Here is the half about numbers, `bar_pytorch.py` has the half about PyTorch, `oracle.py` the bound, `layouts.py` the
strategies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from bar_pytorch import PyTorchBar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import layouts
from op import Op
from oracle import allocations, assert_two_sided, in_float64, largest, like, value_and_gradients
from threads import assert_shares_its_work
from torch import Tensor


class OpBar(PyTorchBar):
    """Inherit, and set `op`. Each body is one line of the bar."""

    op: Op

    @pytest.fixture(params=["float64", "float32", "bfloat16", "float16"])
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return getattr(torch, request.param)

    def compare(self, inputs: Sequence[Tensor], order: int) -> None:
        ours = value_and_gradients(self.op.function, inputs, order)
        oracle = in_float64(self.op.reference, inputs, order)
        eager = [tensor.nan_to_num(0.0) for tensor in value_and_gradients(self.op.eager, inputs, order)]
        assert len(ours) == len(oracle) == len(eager)
        wide = [tensor.double() for tensor in inputs]
        n, condition = len(inputs), self.op.condition(*wide)
        assert_two_sided(ours[0], oracle[0], eager[0], size=self.op.size(*wide))
        for i in range(1, n + 1):
            assert_two_sided(ours[i], oracle[i], eager[i], f"gradient {i}", rows=True, condition=condition)
        if order == 2:
            assert n == 1, "the sizes below are those of an op with one input"
            # With gradient r and cotangent t, the upstream's gradient sums t r / g and the second gradient is a
            # difference of terms as large as t r: that is what their roundings scale with.
            upstream = like(ours[0]).double()
            products = oracle[1].abs() * like(ours[1], seed=11).double().abs()
            size = products.sum(-1) / upstream.abs()
            per_score = condition.squeeze(-1) if condition.dim() else condition
            assert_two_sided(ours[2], oracle[2], eager[2], "upstream's gradient", size=size, condition=per_score)
            size = largest(oracle[1]) * largest(like(ours[1], seed=11).double())
            assert_two_sided(ours[3], oracle[3], eager[3], "second gradient", rows=True, size=size, condition=condition)

    def test_value_and_derivatives_against_float64(self, dtype: torch.dtype) -> None:
        for seed, shapes in enumerate(self.op.shapes):
            self.compare(self.op.inputs(shapes, dtype, seed), order=2)

    def test_every_instruction_set(self, dtype: torch.dtype) -> None:
        from oodkern import _native

        for name in _native.instruction_sets():
            with _native.instruction_set(name):
                self.compare(self.op.inputs(self.op.shapes[-1], dtype), order=2)

    def test_dtypes(self, dtype: torch.dtype) -> None:
        inputs = [tensor.requires_grad_() for tensor in self.op.inputs(self.op.shapes[0], dtype)]
        value = self.op.function(*inputs)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for gradient in torch.autograd.grad(value, inputs, like(value)):
            assert gradient.dtype == dtype

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_layout(self, data: st.DataObject) -> None:
        tensor = data.draw(layouts())
        self.compare([tensor], order=1)

    def test_strides_are_seen(self) -> None:
        """A view gives bit for bit what its dense copy gives, also under upstreams with stride 0."""
        base = self.op.inputs(((6, 9, 34),), torch.float32)[0]
        views = [
            base[:, :, ::2], base[::2], base[:, 1], base.transpose(0, 1), base.transpose(1, 2), base[1:, 2:, 3:],
            base[:1].expand(5, 9, 34), base[:, :1].expand(6, 4, 34), base[..., :1], base[0, 0],
            base[..., :1].expand(6, 9, 7),
        ]  # fmt: skip
        for view in views:
            leaf = view.detach().requires_grad_()  # keeps the strides
            assert leaf.stride() == view.stride()
            dense = view.clone(memory_format=torch.contiguous_format).requires_grad_()
            a, b = self.op.function(leaf), self.op.function(dense)
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            upstream = like(a)
            for g in (upstream, upstream.sum().expand(a.shape)):  # stride-0, as from .sum()
                (x,), (y,) = (
                    torch.autograd.grad(a, leaf, g, retain_graph=True),
                    torch.autograd.grad(b, dense, g, retain_graph=True),
                )
                torch.testing.assert_close(x, y, rtol=0, atol=0)

    def test_strides_are_seen_by_the_double_backward(self) -> None:
        """The same with every layout of the logits, of the upstream and of the cotangent."""
        (base,) = self.op.inputs(((4, 6, 34),), torch.float32)
        cotangents = [like(base), like(base.mT).mT, like(torch.cat([base, base], -1))[..., ::2]]
        cotangents += [like(base[:1]).expand(4, 6, 34), like(base[..., :1]).expand(4, 6, 34)]
        upstreams = [like(base[..., 0]), like(base[..., 0].mT).mT, like(base[0, :, 0]).expand(4, 6)]
        views = (base, base.transpose(0, 1).contiguous().transpose(0, 1))
        for view, t, g in itertools.product(views, cotangents, upstreams):
            results = []
            for dense in (False, True):
                tensors = [x.clone(memory_format=torch.contiguous_format) if dense else x for x in (view, g, t)]
                leaf, upstream, cotangent = tensors
                leaf, upstream = leaf.detach().requires_grad_(), upstream.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.op.function(leaf), leaf, upstream, create_graph=True)
                results.append(torch.autograd.grad(gradient, (upstream, leaf), cotangent))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_blocks_of_a_row_differ_in_magnitude(self, dtype: torch.dtype) -> None:
        """Kernels read long rows in blocks and carry a state from one to the next: each block may be the largest."""
        (base,) = self.op.inputs(((6, 5000),), torch.float64)
        for i, order in enumerate(itertools.permutations((-90.0, 0.0, 90.0))):
            base[i] += torch.tensor(order, dtype=torch.float64).repeat_interleave(1700)[:5000]
        self.compare([base.to(dtype)], order=2)

    def test_uses_all_threads(self) -> None:
        (tensor,) = self.op.inputs(((4000, 5000),), torch.float32)
        assert_shares_its_work(lambda: self.op.function(tensor))

    def test_empty_and_single(self, dtype: torch.dtype) -> None:
        for shape in ((0, 5), (0, 0), (3, 0), (1, 1), (1, 5), (4, 0, 5), (5,), (1,)):
            (tensor,) = self.op.inputs((shape,), dtype)
            tensor.requires_grad_()
            value = self.op.function(tensor)
            assert value.shape == shape[:-1]
            (gradient,) = torch.autograd.grad(value, tensor, like(value))
            assert gradient.shape == shape
            oracle = self.op.reference(tensor.detach().double())
            torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=1e-6)

    def test_repeats_bit_for_bit(self, dtype: torch.dtype) -> None:
        inputs = self.op.inputs(((257, 1000),), dtype)
        first = value_and_gradients(self.op.function, inputs, order=2)
        for a, b in zip(value_and_gradients(self.op.function, inputs, order=2), first, strict=True):
            assert torch.equal(a, b)

    def test_nan_stays_in_its_row(self, dtype: torch.dtype) -> None:
        (tensor,) = self.op.inputs(((5, 1500),), dtype)
        clean = value_and_gradients(self.op.function, [tensor], order=2)
        tensor[2, 1400] = torch.nan
        dirty = value_and_gradients(self.op.function, [tensor], order=2)
        others = torch.tensor([0, 1, 3, 4])
        assert dirty[0][2].isnan()
        for a, b in zip(dirty, clean, strict=True):
            assert torch.equal(a[others], b[others])

    def test_no_temporary_larger_than_the_output(self, dtype: torch.dtype) -> None:
        (tensor,) = self.op.inputs(((512, 1000),), dtype)
        tensor.requires_grad_()
        self.op.function(tensor)  # the first call sets up what is allocated once
        forward = allocations(lambda: self.op.function(tensor))
        value = self.op.function(tensor)
        size = value.numel() * value.element_size()
        assert forward
        assert max(forward) <= size, f"allocated {max(forward)} bytes for a result of {size}"
        upstream = like(value)
        (gradient,) = torch.autograd.grad(value, tensor, upstream, retain_graph=True)
        size = gradient.numel() * gradient.element_size()
        backward = allocations(lambda: torch.autograd.grad(value, tensor, upstream, retain_graph=True))
        assert sum(byte for byte in backward if byte > size // 64) <= size, f"allocated {backward} for {size}"

    def test_rejects_what_it_cannot_compute(self) -> None:
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got list"):
            self.op.function([1.0, 2.0])
        with pytest.raises(TypeError, match="got int64"):
            self.op.function(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="got complex64"):
            self.op.function(torch.ones(2, 3, dtype=torch.complex64))
        with pytest.raises(ValueError, match="without dimensions"):
            self.op.function(torch.tensor(1.0))
