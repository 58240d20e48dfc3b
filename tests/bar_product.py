"""The bar for ops of two matrices, features [N, D] and a weight [K, D] (or keys, or a basis): numbers and memory.

The half about living with PyTorch is in `bar_product_pytorch.py`. As in `bar.py`, a room describes its op once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from bar_product_pytorch import ProductPyTorchBar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import FLOATS
from oracle import assert_two_sided, in_float64, largest, like, memory_events, value_and_gradients
from torch import Tensor

WORKSPACE = 16 << 20  # bytes that an op may hold beyond its arguments, results and gradients


def len_of(shapes: Sequence[tuple[int, ...]]) -> int:
    return shapes[0][0]


class ProductBar(ProductPyTorchBar):
    """Inherit, and set `op` (see ProductOp)."""

    @pytest.fixture(params=["float64", "float32", "bfloat16", "float16"])
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return getattr(torch, request.param)

    def compare(self, inputs: Sequence[Tensor], order: int) -> None:
        ours = value_and_gradients(self.op.function, inputs, order)
        oracle = in_float64(self.op.reference, inputs, order)
        eager = [tensor.nan_to_num(0.0) for tensor in value_and_gradients(self.op.eager, inputs, order)]
        assert len(ours) == len(oracle) == len(eager)
        n = len(inputs)
        # A sum of products errs by roundings of its terms and not of its own size, which cancellation may leave small:
        # `condition` is what one relative rounding of a term becomes at most, in units of the largest of the row.
        condition = self.op.condition(*[tensor.double() for tensor in inputs])
        self.judge(ours[0], oracle[0], eager[0], "value", condition)
        terms = self.op.terms(*[tensor.double() for tensor in inputs]) or [torch.zeros(()) for _ in inputs]
        for i in range(1, n + 1):
            self.judge(ours[i], oracle[i], eager[i], f"gradient {i}", condition, terms[i - 1])
        for i in range(n + 1, len(ours)):
            self.judge(ours[i], oracle[i], eager[i], f"second-order result {i - n}", 8 * condition)

    def judge(
        self, ours: Tensor, oracle: Tensor, eager: Tensor, what: str, condition: float, terms: Tensor | float = 0.0
    ) -> None:
        """Row by row; one may be small by cancellation, so its scale is at least the typical one of its tensor."""
        rows = ours.dim() == 2
        size = largest(oracle) if rows else oracle.abs()
        typical = size.nan_to_num(0.0, 0.0).square().mean().sqrt() if size.numel() else size
        size = (torch.maximum(size, typical) + terms).expand_as(oracle)
        if ours.dtype == torch.bfloat16:
            # Slopes are rounded to bfloat16 before they are multiplied on, as eager's are; which may be exact by luck.
            condition = condition + torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        assert_two_sided(ours, oracle, eager, what, rows=rows, size=size, condition=condition)

    def test_value_and_derivatives_against_float64(self, dtype: torch.dtype) -> None:
        for seed, shapes in enumerate(self.op.shapes):
            self.compare(self.op.inputs(shapes, dtype, seed), self.op.order)

    def test_every_instruction_set(self, dtype: torch.dtype) -> None:
        from oodkern import _native

        for name in _native.instruction_sets():
            with _native.instruction_set(name):
                self.compare(self.op.inputs(self.op.shapes[-1], dtype), self.op.order)

    def test_logits_are_never_rounded(self, dtype: torch.dtype) -> None:
        """Relative error of every value under 3e-5 against float64 of the rounded inputs, whatever eager does."""
        for seed, shapes in enumerate(self.op.shapes):
            inputs = self.op.inputs(shapes, dtype, seed)
            exact = self.op.reference(*[tensor.double() for tensor in inputs])
            error = (self.op.function(*inputs).double() - exact).abs()
            assert (error <= 3e-5 * exact.abs() + 1e-6).all(), float((error / exact.abs()).max())

    def test_dtypes(self, dtype: torch.dtype) -> None:
        inputs = [tensor.requires_grad_() for tensor in self.op.inputs(self.op.shapes[0], dtype)]
        value = self.op.function(*inputs)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for tensor, gradient in zip(inputs, torch.autograd.grad(value, inputs, like(value)), strict=True):
            assert (gradient.dtype, gradient.shape) == (dtype, tensor.shape)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_layout(self, data: st.DataObject) -> None:
        """Any strides, offsets and small shapes."""
        dtype = data.draw(st.sampled_from(FLOATS))
        shapes = self.op.draw_shapes(data.draw)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

        def laid_out(shape: tuple[int, ...]) -> Tensor:
            kind = data.draw(
                st.sampled_from(("dense", "transposed", "every other row", "every other column", "offset"))
            )

            def random(*size: int) -> Tensor:
                return (torch.randn(size, generator=generator, dtype=torch.float64) * self.op.scale).to(dtype)

            if len(shape) == 1:
                return random(2 * shape[0] + 1)[1::2]
            rows, columns = shape
            return {
                "dense": lambda: random(rows, columns),
                "transposed": lambda: random(columns, rows).T,
                "every other row": lambda: random(2 * rows + 1, columns)[1::2],
                "every other column": lambda: random(rows, 2 * columns + 1)[:, 1::2],
                "offset": lambda: random(rows * columns + 3)[3:].view(rows, columns),
            }[kind]()

        self.compare([laid_out(shape) for shape in shapes], order=1)

    def test_expanded_rows(self) -> None:
        """Rows that share memory (stride 0) are read as rows of their own, also of upstreams and cotangents."""
        inputs = self.op.inputs(self.op.shapes[-1], torch.float32)
        for i in range(len(inputs)):
            tensor = inputs[i]
            expanded = [*inputs[:i], tensor[:1].expand(tensor.shape), *inputs[i + 1 :]]
            dense = [t.contiguous() for t in expanded]
            for a, b in zip(
                value_and_gradients(self.op.function, expanded, self.op.order),
                value_and_gradients(self.op.function, dense, self.op.order),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        one, two = self.op.function(*leaves), self.op.function(*leaves)
        number = torch.tensor(0.7)
        for a, b in zip(
            torch.autograd.grad(one, leaves, number.expand(one.shape)),
            torch.autograd.grad(two, leaves, number.expand(two.shape).contiguous()),
            strict=True,
        ):
            assert torch.equal(a, b)

    def test_any_subset_requires_gradients(self, dtype: torch.dtype) -> None:
        inputs = self.op.inputs(self.op.shapes[0], dtype)
        full = value_and_gradients(self.op.function, inputs)
        for chosen in itertools.product((False, True), repeat=len(inputs)):
            leaves = [t.detach().clone().requires_grad_(flag) for t, flag in zip(inputs, chosen, strict=True)]
            value = self.op.function(*leaves)
            assert torch.equal(value, full[0])
            assert value.requires_grad == any(chosen)
            if not any(chosen):
                continue
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            upstream = like(value).requires_grad_()
            gradients = torch.autograd.grad(value, wanted, upstream, create_graph=self.op.order == 2)
            expected = [gradient for gradient, flag in zip(full[1:], chosen, strict=True) if flag]
            for a, b in zip(gradients, expected, strict=True):
                # That of features alone may be formed before it is multiplied by the upstream.
                waited = not any(chosen[1:]) and self.op.order == 1
                units = 8 * torch.finfo(a.dtype).eps * float(b.abs().max()) if waited else 0
                torch.testing.assert_close(a.detach(), b, rtol=0, atol=units)
            if self.op.order == 2:
                self._second_order_of(inputs, chosen, gradients, [upstream, *wanted])

    def _second_order_of(self, inputs: list[Tensor], chosen: Sequence[bool], gradients, into) -> None:
        """Cotangents of some gradients only, against the reference."""
        cotangents = [like(gradient, seed=11) for gradient in gradients]
        second = torch.autograd.grad(gradients, into, cotangents)
        leaves = [t.detach().double().requires_grad_(flag) for t, flag in zip(inputs, chosen, strict=True)]
        value = self.op.reference(*leaves)
        upstream = like(into[0].detach()).double().requires_grad_()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        exact = torch.autograd.grad(value, wanted, upstream, create_graph=True)
        oracle = torch.autograd.grad(exact, [upstream, *wanted], [t.double() for t in cotangents], allow_unused=True)
        eps = torch.finfo(inputs[0].dtype).eps
        for a, b in zip(second, oracle, strict=True):
            b = torch.zeros_like(a).double() if b is None else b
            assert (a.double() - b).abs().max() <= 100 * eps * b.abs().max() + 1e-5, float((a - b).abs().max())

    def test_empty_and_single(self, dtype: torch.dtype) -> None:
        for shapes in self.op.edges:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, dtype)]
            value = self.op.function(*inputs)
            exact = self.op.reference(*[tensor.detach().double() for tensor in inputs])
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
            results = value_and_gradients(self.op.function, inputs, self.op.order)
            for tensor, gradient in zip(inputs, results[1 : 1 + len(inputs)], strict=True):
                assert gradient.shape == tensor.shape
                assert gradient.isfinite().all()
                if len_of(shapes) == 0:
                    assert (gradient == 0).all()

    def test_repeats_bit_for_bit(self, dtype: torch.dtype) -> None:
        inputs = self.op.inputs(self.op.large, dtype)
        first = value_and_gradients(self.op.function, inputs, self.op.order)
        for a, b in zip(value_and_gradients(self.op.function, inputs, self.op.order), first, strict=True):
            assert torch.equal(a, b)

    def test_nan_stays_in_its_row(self, dtype: torch.dtype) -> None:
        inputs = self.op.inputs(self.op.shapes[-1], dtype)
        clean = value_and_gradients(self.op.function, inputs)
        inputs[0] = inputs[0].clone()
        inputs[0][1, -1] = torch.nan
        dirty = value_and_gradients(self.op.function, inputs)
        rows = len(inputs[0])
        others = torch.tensor([i for i in range(len(clean[0])) if i % rows != 1])
        assert dirty[0][1].isnan()
        assert torch.equal(dirty[0][others], clean[0][others])
        others = others[others < rows]
        assert torch.equal(dirty[1][others], clean[1][others])

    def test_workspace_is_bounded(self) -> None:
        """Nothing of N x K, and the same at N and 16 N: what passes hold beyond results and gradients."""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            held = []
            for shapes in (self.op.large, self.op.larger):
                inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, dtype)]
                held.append(self._held(inputs))
            for small, big in zip(*held, strict=True):
                assert max(small, big) <= WORKSPACE, held
                more = self.op.bytes_per_row * (len_of(self.op.larger) - len_of(self.op.large))
                assert big <= small + more + (64 << 10), held

    def _held(self, inputs: list[Tensor]) -> list[int]:
        """The most that forward, backward and double backward hold at once, in bytes, less what they return."""

        def beyond(work) -> int:
            results: list = []
            peak = max(itertools.accumulate(memory_events(lambda: results.append(work()))))
            returned = results[0] if isinstance(results[0], tuple) else (results[0],)
            return peak - sum(t.numel() * t.element_size() for t in returned if t is not None)

        forward = beyond(lambda: self.op.function(*inputs))
        value = self.op.function(*inputs)
        if self.op.waits:
            forward -= sum(tensor.numel() * value.element_size() for tensor in inputs)
        upstream = like(value).requires_grad_()
        order = self.op.order == 2
        backward = beyond(lambda: torch.autograd.grad(value, inputs, upstream, retain_graph=True))
        if not order:
            return [forward, backward]
        gradients = torch.autograd.grad(value, inputs, upstream, create_graph=True)
        cotangents = [like(gradient) for gradient in gradients]
        second = beyond(lambda: torch.autograd.grad(gradients, [upstream, *inputs], cotangents, retain_graph=True))
        return [forward, backward, second]

    def test_rejects_what_it_cannot_compute(self) -> None:
        inputs = self.op.inputs(self.op.shapes[0], torch.float32)
        with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got list"):
            self.op.function([[1.0]], *inputs[1:])
        with pytest.raises(TypeError, match="got int64"):
            self.op.function(inputs[0].long(), *inputs[1:])
        with pytest.raises(ValueError, match=r"expected \["):
            self.op.function(inputs[0][0], *inputs[1:])
        with pytest.raises(ValueError, match="expected"):
            self.op.function(inputs[0], inputs[1][:, :-1] if self.op.by_columns else inputs[1][:-1], *inputs[2:])
        if not self.op.mixed:
            with pytest.raises(TypeError, match=r"expected float32 as .* are, got float64"):
                self.op.function(inputs[0], inputs[1].double(), *inputs[2:])
        with pytest.raises(ValueError, match="expected on cpu, where"):
            self.op.function(inputs[0], inputs[1].to("meta"), *inputs[2:])
