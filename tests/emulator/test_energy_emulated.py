"""Room `energy` on CUDA, without a GPU: the bar's numbers, computed by the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from bar import OpBar
from emulate import ORDERS, library, sanitized
from layouts import FLOATS
from op import Op
from oracle import like, value_and_gradients
from rows import EmulatedOps

import oodkern
from oodkern import reference
from oodkern.ops import _autograd

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


@pytest.fixture(scope="session")
def emulated(programs):
    return EmulatedOps(library("rows", programs))


@pytest.fixture(autouse=True)
def in_the_emulator(emulated, monkeypatch):
    emulated.order, emulated.seed, emulated.multiprocessors, emulated.grad_offset = 0, 0, 4, 0
    monkeypatch.setattr(_autograd, "_raw", emulated.raw)


def largest_finite(z):
    """Rounding E, as large as the logits, moves E / T and with it every softmax of the row by that much."""
    return z.abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True) if z.shape[-1] else torch.zeros(())


class EmulatedBar(OpBar):
    """The bar without what is about PyTorch or the CPU's kernels; the orders of threads instead."""

    test_every_instruction_set = test_uses_all_threads = test_no_temporary_larger_than_the_output = None
    test_opcheck = test_compile_fullgraph = test_compiled_func_grad = test_autocast_returns_float32 = None
    test_third_derivative_is_refused = test_forward_mode_raises = test_saved_tensor_hooks = None
    test_func_grad_and_vmap = test_rejects_what_it_cannot_compute = None

    def test_gradcheck(self):
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert torch.autograd.gradcheck(self.op.function, inputs)

    def test_gradgradcheck(self):
        for shapes in self.op.shapes[:2]:
            inputs = [tensor.requires_grad_() for tensor in self.op.inputs(shapes, torch.float64)]
            assert torch.autograd.gradgradcheck(self.op.function, inputs)

    def test_strides_are_seen(self):
        """To rounding: the order in which a row is added up depends on where it lies in memory."""
        base = self.op.inputs(((6, 9, 34),), torch.float32)[0]
        views = [base[:, :, ::2], base[::2], base.transpose(0, 1), base[1:, 2:, 3:], base[:1].expand(5, 9, 34)]
        for view in [*views, base[:, :1].expand(6, 4, 34), base[..., :1].expand(6, 9, 7), base[0, 0]]:
            self.compare([view], order=2)

    def test_every_order_gives_the_same_bits(self, emulated, dtype):
        for shapes in (((5, 40),), ((3, 1000),), ((2, 5000),)):
            inputs = self.op.inputs(shapes, dtype)
            expected = value_and_gradients(self.op.function, inputs, order=2)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                for a, b in zip(value_and_gradients(self.op.function, inputs, 2), expected, strict=True):
                    assert torch.equal(a, b)
            emulated.order = 0

    def test_every_alignment(self, emulated, dtype):
        """Of rows and of their gradients, from one multiple of 16 bytes to the next."""
        for K in (13, 250, 1100):
            (base,) = self.op.inputs(((3, K + 24),), dtype)
            for offset in range(0, 16 // base.element_size()):
                emulated.grad_offset = offset * 3 % 8
                self.compare([base[:, offset : offset + K]], order=2)

    def test_blocks_that_share_a_row(self, emulated, dtype):
        """From one block a row to as many as there is work for."""
        for emulated.multiprocessors in (1, 2, 132):
            self.compare(self.op.inputs(((2, 12001),), dtype), order=2)
        assert emulated.launched() >= {"reduce_rows", "finish_rows", "map_rows"}

    def test_blocks_walk_over_rows(self, emulated):
        """More rows than the emulator's 24 blocks take at once."""
        for shape in ((900, 3), (200, 70), (30, 1030)):
            self.compare(self.op.inputs((shape,), torch.float32), order=2)


class TestEmulatedEnergy(EmulatedBar):
    op = Op(oodkern.energy, reference.energy, lambda z: -torch.logsumexp(z, -1), SHAPES, condition=largest_finite)


class TestEmulatedEnergyWithTemperature(EmulatedBar):
    op = Op(
        lambda z: oodkern.energy(z, temperature=0.37),
        lambda z: reference.energy(z, 0.37),
        lambda z: -0.37 * torch.logsumexp(z / 0.37, -1),
        SHAPES,
        condition=lambda z: 1 / 0.37 * largest_finite(z),
    )


class TestEmulatedJointEnergy(EmulatedBar):
    op = Op(oodkern.joint_energy, reference.joint_energy, lambda z: torch.nn.functional.softplus(z).sum(-1), SHAPES)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [3, 1500, 20000])
class TestInfinities:
    def test_row_of_minus_infinity(self, dtype, K):
        z = torch.full((2, K), -torch.inf, dtype=dtype)
        z[1] = 1
        z.requires_grad_()
        energy = oodkern.energy(z)
        assert energy[0] == torch.inf
        (gradient,) = torch.autograd.grad(energy, z, like(energy))
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).all()
        assert oodkern.joint_energy(z)[0] == 0

    def test_some_infinities(self, dtype, K):
        z = torch.zeros(3, K, dtype=dtype)
        z[0, 1], z[1, K - 1], z[2, 0] = -torch.inf, torch.inf, torch.nan
        energy, joint_energy = oodkern.energy(z), oodkern.joint_energy(z)
        torch.testing.assert_close(energy[0].item(), -torch.tensor(float(K - 1)).log().item(), rtol=1e-6, atol=0)
        assert energy[1] == -torch.inf
        assert joint_energy[1] == torch.inf
        assert energy.isnan().tolist() == joint_energy.isnan().tolist() == [False, False, True]


@pytest.mark.slow
def test_sanitizers_pass_every_kernel(programs):
    done = sanitized("rows", programs)
    assert done.returncode == 0, done.stderr
    assert "warp_rows" in done.stdout
