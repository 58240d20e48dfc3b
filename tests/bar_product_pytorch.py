"""Ops of two matrices in PyTorch: autograd, torch.func, torch.compile, autocast, hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from bar_pytorch import TORCH
from hypothesis import strategies as st
from op import Op
from oracle import assert_two_sided, like, value_and_gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck


@dataclass(frozen=True, kw_only=True)
class ProductOp(Op):
    """An op of matrices.

    make: a case of N rows, D columns and K classes as the shapes of the inputs.
    order: how often it can be differentiated.
    by_columns: whether the second input has as many columns as the first (a basis has as many rows).
    mixed: whether the second input may have another dtype.
    autocasts: whether autocast casts the inputs.
    raw_products: of a raw op's name, its arguments from the inputs.
    condition: of float64 inputs, the units of rounding that are allowed beyond the bound.
    terms: of float64 inputs, how large the terms of each gradient's rows are, [rows, 1] each; nothing where a gradient
        is as large as its terms.
    bytes_per_row: what is kept for each row.
    waits: whether gradients are formed with the value, and wait in its dtype.
    """

    make: Callable[[int, int, int], tuple[tuple[int, ...], ...]]
    order: int = 2
    by_columns: bool = True
    mixed: bool = False
    autocasts: bool = True
    terms: Callable[..., Sequence[Tensor]] = lambda *inputs: ()
    bytes_per_row: int = 0
    waits: bool = False
    raw_products: Sequence[tuple[str, Callable[[Sequence[Tensor]], tuple]]] = ()

    @property
    def edges(self) -> list[tuple[tuple[int, ...], ...]]:
        return [self.make(*sizes) for sizes in ((0, 3, 4), (1, 1, 1), (1, 5, 3), (3, 5, 1), (2, 1, 7))]

    @property
    def large(self) -> tuple[tuple[int, ...], ...]:
        return self.make(3000, 64, 1500)

    @property
    def larger(self) -> tuple[tuple[int, ...], ...]:
        return self.make(48_000, 64, 1500)

    def draw_shapes(self, draw: Callable) -> tuple[tuple[int, ...], ...]:
        N = draw(st.integers(1, 40))
        return self.make(N, draw(st.sampled_from((1, 2, 7, 16, 33, 100))), draw(st.sampled_from((1, 2, 5, 17, 63))))


class ProductPyTorchBar:
    op: ProductOp

    def leaves(self, shapes: tuple, dtype: torch.dtype) -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in self.op.inputs(shapes, dtype)]

    def test_gradcheck(self) -> None:
        assert gradcheck(self.op.function, self.leaves(self.op.shapes[0], torch.float64), check_batched_grad=True)

    def test_gradgradcheck(self) -> None:
        if self.op.order == 2:
            leaves = self.leaves(self.op.shapes[0], torch.float64)
            assert gradgradcheck(self.op.function, leaves, check_batched_grad=True)

    def test_one_derivative_more_is_refused(self) -> None:
        leaves = self.leaves(self.op.shapes[0], torch.float64)
        times = ("once", "twice")[self.op.order - 1]
        result = self.op.function(*leaves).sin().sum()
        for _ in range(self.op.order):
            result = torch.autograd.grad(result, leaves[0], create_graph=True)[0].sin().sum()
        with pytest.raises(RuntimeError, match=f"can be differentiated {times}, and a .* derivative was asked for"):
            torch.autograd.grad(result, leaves[0])

    def test_opcheck(self, dtype: torch.dtype) -> None:
        for name, arguments in self.op.raw_products:
            op = getattr(torch.ops.oodkern, name).default
            for shapes in (self.op.shapes[0], self.op.edges[0]):
                torch.library.opcheck(op, arguments(self.op.inputs(shapes, dtype)))
            first, *rest = self.op.inputs(self.op.shapes[0], dtype)
            torch.library.opcheck(op, arguments([first.T.contiguous().T, *rest]))

    def test_autocast_returns_float32(self) -> None:
        inputs = self.op.inputs(self.op.shapes[-1], torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.autocast("cpu", dtype):
                value = self.op.function(*leaves)
            assert value.dtype == torch.float32
            cast = [tensor.to(dtype) if self.op.autocasts else tensor for tensor in inputs]
            # The inputs are rounded, and nothing after them.
            exact = self.op.reference(*[tensor.double() for tensor in cast])
            assert_two_sided(value.detach(), exact, self.op.function(*cast), condition=self.op.condition(*inputs))
            for gradient in torch.autograd.grad(value, leaves, like(value)):
                assert gradient.dtype == torch.float32
                assert gradient.isfinite().all()

    def test_compile_fullgraph(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.op.function, fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = self.op.inputs(self.op.shapes[1], dtype)
            for a, b in zip(
                value_and_gradients(compiled, inputs), value_and_gradients(self.op.function, inputs), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.skipif(
        TORCH < (2, 15),
        reason="compiled torch.func.grad over any autograd.Function is silently wrong before torch 2.15 (seen on 2.13)",
    )
    def test_compiled_func_grad(self) -> None:
        torch._dynamo.reset()
        inputs = self.op.inputs(self.op.shapes[0], torch.float32)

        def total(*tensors: Tensor) -> Tensor:
            return self.op.function(*tensors).sum()

        expected = torch.func.grad(total)(*inputs)
        torch.testing.assert_close(torch.compile(torch.func.grad(total))(*inputs), expected, rtol=1e-6, atol=1e-6)

    def test_func_grad_and_vmap(self) -> None:
        """One gradient a set of features, with shared and with own weights; all inputs' gradients; the Hessian."""
        inputs = self.op.inputs(self.op.shapes[0], torch.float64)
        everything = tuple(range(len(inputs)))

        def total(*tensors: Tensor) -> Tensor:
            return self.op.function(*tensors).sin().sum()

        def expected(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            return torch.autograd.grad(total(*leaves), leaves)

        for a, b in zip(torch.func.grad(total, everything)(*inputs), expected(*inputs), strict=True):
            torch.testing.assert_close(a, b)
        many = torch.stack([inputs[0], inputs[0] * 0.5, inputs[0] + 1.0])
        one = torch.func.vmap(torch.func.grad(total), in_dims=(0, *[None] * (len(inputs) - 1)))(many, *inputs[1:])
        all_of_them = torch.func.vmap(torch.func.grad(total, everything), in_dims=(0, *[None] * (len(inputs) - 1)))(
            many, *inputs[1:]
        )
        own = torch.stack([inputs[1], inputs[1] * 0.7, inputs[1] - 1.0], 1)
        with_own = torch.func.vmap(torch.func.grad(total, everything), in_dims=(0, 1, *[None] * (len(inputs) - 2)))(
            many, own, *inputs[2:]
        )
        for i in range(3):
            shared = expected(many[i], *inputs[1:])
            torch.testing.assert_close(one[i], shared[0])
            for a, b in zip(all_of_them, shared, strict=True):
                torch.testing.assert_close(a[i], b)
            for a, b in zip(with_own, expected(many[i], own[:, i], *inputs[2:]), strict=True):
                torch.testing.assert_close(a[i], b)
        if self.op.order == 2:
            rest = inputs[1:]
            hessian = torch.func.jacrev(torch.func.jacrev(lambda x: self.op.function(x, *rest).sin().sum()))(inputs[0])
            oracle = torch.func.jacrev(torch.func.jacrev(lambda x: self.op.reference(x, *rest).sin().sum()))(inputs[0])
            torch.testing.assert_close(hessian, oracle)

    def test_forward_mode_raises(self) -> None:
        first, *rest = self.op.inputs(self.op.shapes[0], torch.float64)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            torch.func.jvp(lambda x: self.op.function(x, *rest), (first,), (like(first),))

    def test_saved_tensor_hooks(self) -> None:
        """Activations that are moved away and back (offload) give the same gradients."""
        inputs = self.op.inputs(self.op.shapes[0], torch.float64)
        expected = value_and_gradients(self.op.function, inputs, self.op.order)
        packed = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone().T.contiguous().T if tensor.dim() == 2 else tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
            again = value_and_gradients(self.op.function, inputs, self.op.order)
        assert packed
        for a, b in zip(again, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
