"""What room `energy` is judged by on CUDA, in the emulator and on a GPU: the bar's numbers, and the shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bar import OpBar
from op import Op
from oracle import value_and_gradients
from room_energy import eager_energy, eager_joint_energy, largest_finite, terms_of_energy

import oodkern
from oodkern import reference

# Rows in the registers of 8 lanes, of 32, and in blocks; one lane's vector, a warp's, and one element more or less.
SHAPES = [
    ((3, 5),),
    ((2, 3, 4),),
    ((1, 1),),
    ((35, 10),),
    ((9, 64),),
    ((3, 65),),
    ((5, 256),),
    ((4, 257),),
    ((2, 1000),),
    ((2, 1024),),
    ((2, 1025),),
    ((1, 9000),),
    ((9, 2500),),
]


def energy_op(temperature: float = 1.0, through: Callable = lambda function: function) -> Op:
    return Op(
        through(lambda z: oodkern.energy(z, temperature)),
        lambda z: reference.energy(z, temperature),
        lambda z: eager_energy(z, temperature),
        SHAPES,
        size=terms_of_energy(temperature),
        condition=lambda z: 1 / temperature * largest_finite(z),
    )


def joint_energy_op(through: Callable = lambda function: function) -> Op:
    return Op(
        through(oodkern.joint_energy),
        reference.joint_energy,
        eager_joint_energy,
        SHAPES,
    )


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    """Of the row engine, by both reducers."""
    for op in (energy_op(0.5, through), joint_energy_op(through)):
        for shape in ((3, 5), (2, 1000), (2, 200_000)):
            value_and_gradients(op.function, [torch.zeros(shape)], order=2)


class CudaBar(OpBar):
    """The bar's numbers, without what is about the CPU's kernels or about PyTorch."""

    test_every_instruction_set = test_uses_all_threads = test_no_temporary_larger_than_the_output = None
    test_opcheck = test_compile_fullgraph = test_compiled_func_grad = test_autocast_returns_float32 = None
    test_third_derivative_is_refused = test_forward_mode_raises = test_saved_tensor_hooks = None
    test_func_grad_and_vmap = test_rejects_what_it_cannot_compute = None

    def test_gradcheck(self) -> None:
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert torch.autograd.gradcheck(self.op.function, inputs)

    def test_gradgradcheck(self) -> None:
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert torch.autograd.gradgradcheck(self.op.function, inputs)

    def test_strides_are_seen(self) -> None:
        """To rounding: the order in which a row is added up depends on where it lies in memory."""
        base = self.op.inputs(((6, 9, 34),), torch.float32)[0]
        views = [base[:, :, ::2], base[::2], base.transpose(0, 1), base[1:, 2:, 3:], base[:1].expand(5, 9, 34)]
        for view in [*views, base[:, :1].expand(6, 4, 34), base[..., :1].expand(6, 9, 7), base[0, 0]]:
            self.compare([view], order=2)
