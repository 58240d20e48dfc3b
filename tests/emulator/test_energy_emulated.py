"""Room `energy` on CUDA, without a GPU: the bar's numbers, computed by the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulate import ORDERS
from energy_cases import CudaBar, energy_op, joint_energy_op
from layouts import FLOATS
from oracle import like, value_and_gradients

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")


class EmulatedBar(CudaBar):
    """Beside the bar's: orders of threads, alignments, numbers of blocks."""

    def test_every_order_gives_the_same_bits(self, emulated, dtype):
        for shapes in (((5, 40),), ((3, 1000),), ((2, 5000),)):
            inputs = self.op.inputs(shapes, dtype)
            expected = value_and_gradients(self.op.function, inputs, order=2)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                for a, b in zip(value_and_gradients(self.op.function, inputs, 2), expected, strict=True):
                    assert torch.equal(a, b)
            emulated.set()

    def test_every_alignment(self, emulated, dtype):
        """Of rows and of their gradients, from one multiple of 16 bytes to the next."""
        for K in (13, 250, 1100):
            (base,) = self.op.inputs(((3, K + 24),), dtype)
            for offset in range(0, 16 // base.element_size()):
                emulated.offset = offset * 3 % 8 * base.element_size()
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
    op = energy_op()


class TestEmulatedEnergyWithTemperature(EmulatedBar):
    op = energy_op(0.37)


class TestEmulatedJointEnergy(EmulatedBar):
    op = joint_energy_op()


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
