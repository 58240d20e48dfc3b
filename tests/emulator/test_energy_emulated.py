"""Room `energy` on CUDA, without a GPU: the bar's numbers, computed by the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated_bar import EmulatedBar
from energy_cases import energy_op, joint_energy_op
from layouts import FLOATS
from oracle import like

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")


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
