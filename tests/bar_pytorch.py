"""The half of the bar that is about living with PyTorch: autograd, torch.func, torch.compile, autocast, hooks."""

from __future__ import annotations

import itertools

import pytest
import torch
from op import Op
from oracle import assert_two_sided, like, value_and_gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


class PyTorchBar:
    op: Op

    def test_gradcheck(self) -> None:
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert gradcheck(self.op.function, inputs, check_batched_grad=True)

    def test_gradgradcheck(self) -> None:
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert gradgradcheck(self.op.function, inputs, check_batched_grad=True)

    def test_third_derivative_is_refused(self) -> None:
        inputs = [tensor.requires_grad_() for tensor in self.op.inputs(self.op.shapes[0], torch.float64)]
        (first,) = torch.autograd.grad(self.op.function(*inputs).sin().sum(), inputs, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(second.sum(), inputs)

    def test_opcheck(self, dtype: torch.dtype) -> None:
        for (name, arguments), shape in itertools.product(self.op.raw, ((5, 7), (0, 7), (1, 1), (2, 3, 4), (9,))):
            (tensor,) = self.op.inputs((shape,), dtype)
            torch.library.opcheck(getattr(torch.ops.oodkern, name).default, arguments(tensor))
            if tensor.dim() > 1:
                torch.library.opcheck(getattr(torch.ops.oodkern, name).default, arguments(tensor.transpose(0, -1)))

    def test_autocast_returns_float32(self) -> None:
        (tensor,) = self.op.inputs(((6, 8),), torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            weight = torch.eye(8, requires_grad=True)
            with torch.autocast("cpu", dtype):
                logits = tensor @ weight
                value = self.op.function(logits)
            assert logits.dtype == dtype
            assert value.dtype == torch.float32
            assert_two_sided(
                value.detach(), self.op.reference(logits.detach().double()), self.op.eager(logits).detach().float()
            )
            (gradient,) = torch.autograd.grad(value, weight, like(value))
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()

    def test_compile_fullgraph(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(self.op.function, fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = self.op.inputs(((6, 33),), dtype)
            for a, b in zip(
                value_and_gradients(compiled, inputs), value_and_gradients(self.op.function, inputs), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=0, atol=0)

    @pytest.mark.skipif(
        TORCH < (2, 15),
        reason="compiled torch.func.grad over any autograd.Function is silently wrong before torch 2.15 (seen on 2.13)",
    )
    def test_compiled_func_grad(self) -> None:
        torch._dynamo.reset()
        (tensor,) = self.op.inputs(((33,),), torch.float32)
        expected = torch.func.grad(self.op.function)(tensor)
        torch.testing.assert_close(torch.compile(torch.func.grad(self.op.function))(tensor), expected, rtol=0, atol=0)

    def test_func_grad_and_vmap(self) -> None:
        (tensor,) = self.op.inputs(((4, 6, 5),), torch.float64)
        leaf = tensor.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.op.function(leaf).sum(), leaf)
        one = torch.func.grad(lambda t: self.op.function(t).sum())
        torch.testing.assert_close(one(tensor), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.func.vmap(one)(tensor), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.func.vmap(one, in_dims=1, out_dims=1)(tensor), expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.func.vmap(torch.func.vmap(one))(tensor), expected, rtol=0, atol=0)
        # Second order through jacrev of jacrev, which puts vmap over the double backward.
        hessian = torch.func.jacrev(torch.func.jacrev(self.op.function))(tensor[0, 0])
        oracle = torch.func.jacrev(torch.func.jacrev(self.op.reference))(tensor[0, 0])
        torch.testing.assert_close(hessian, oracle)

    def test_forward_mode_raises(self) -> None:
        (tensor,) = self.op.inputs(((3, 5),), torch.float64)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            torch.func.jvp(self.op.function, (tensor,), (like(tensor),))

    def test_saved_tensor_hooks(self) -> None:
        """Activations that are moved away and back (offload) give the same gradients, to second order."""
        inputs = self.op.inputs(((5, 9),), torch.float64)
        expected = value_and_gradients(self.op.function, inputs, order=2)
        packed = []

        def pack(tensor: Tensor) -> Tensor:
            packed.append(tensor)
            return tensor.clone().T.contiguous().T if tensor.dim() == 2 else tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
            again = value_and_gradients(self.op.function, inputs, order=2)
        assert packed
        for a, b in zip(again, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
