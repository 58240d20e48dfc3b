"""Room `energy` on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from energy_cases import CudaBar, energy_op, joint_energy_op
from gpu import randn, through_gpu
from oracle import like

import oodkern
from oodkern import reference

pytestmark = pytest.mark.gpu


class TestGpuEnergy(CudaBar):
    op = energy_op(through=through_gpu)


class TestGpuEnergyWithTemperature(CudaBar):
    op = energy_op(0.37, through=through_gpu)


class TestGpuJointEnergy(CudaBar):
    op = joint_energy_op(through=through_gpu)


FUNCTIONS = [(oodkern.energy, reference.energy), (oodkern.joint_energy, reference.joint_energy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [13, 250, 1100, 200_001])
def test_views_are_read_in_place(K, dtype):
    """Every alignment of rows and of cotangents."""
    base = randn(3, K + 24, dtype=dtype)
    for (function, oracle), offset in ((pair, offset) for pair in FUNCTIONS for offset in range(0, 8, 3)):
        view = base[:, offset : offset + K].detach().requires_grad_()
        value = function(view)
        torch.testing.assert_close(value.double(), oracle(view.detach().double()), rtol=1e-5, atol=1e-5)
        g = randn(3, seed=1).requires_grad_()
        (gradient,) = torch.autograd.grad(value, view, g, create_graph=True)
        t = randn(3, K + 5, dtype=dtype, seed=2)[:, 5:]
        ours = torch.autograd.grad(gradient, (g, view), t)
        z = view.detach().double().requires_grad_()
        h = g.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(oracle(z), z, h, create_graph=True)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.detach().double(), exact.detach(), rtol=2 * eps + 1e-4, atol=1e-6)
        for a, b in zip(ours, torch.autograd.grad(exact, (h, z), t.double()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2 * eps + 1e-3, atol=1e-4)


def test_other_devices_are_refused():
    z = randn(4, 5)
    with pytest.raises(RuntimeError, match="grad: expected the device of logits"):
        torch.ops.oodkern.energy_backward(torch.ones(4), z, torch.ones(4, device="cuda"), 1.0)


def test_offsets_of_64_bits():
    """More than 2^31 elements, in short rows and in one long one."""
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of free memory")
    z = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    for shape in ((-1, 1024), (1, -1)):
        rows = z.view(shape)
        rows[-1, -1] = 40.0
        value = oodkern.energy(rows)
        assert value[-1].item() == pytest.approx(-40.0, abs=1e-3)
        gradient = torch.ops.oodkern.energy_backward(torch.ones_like(value), rows, value, 1.0)
        assert gradient[-1, -1].item() == pytest.approx(-1.0)


@pytest.mark.parametrize(("function", "oracle"), FUNCTIONS)
def test_compile_and_opcheck(function, oracle):
    torch._dynamo.reset()
    z = randn(6, 33).requires_grad_()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(z), function(z), rtol=0, atol=0)
    name = function.__name__
    constants = (1.0,) if name == "energy" else ()
    torch.library.opcheck(getattr(torch.ops.oodkern, name).default, (z.detach(), *constants))


def test_func_grad_and_vmap():
    z = randn(4, 6, 5)
    one = torch.func.grad(lambda t: oodkern.energy(t).sum())
    torch.testing.assert_close(torch.func.vmap(one)(z), one(z), rtol=0, atol=0)


def test_repeats_bit_for_bit_on_tensors_of_the_device():
    for shape in ((257, 1000), (3, 300_000)):
        z = randn(*shape)
        first = oodkern.energy(z)
        g = like(first.cpu()).cuda()
        for _ in range(3):
            assert torch.equal(oodkern.energy(z), first)
            gradients = [torch.ops.oodkern.energy_backward(g, z, first, 1.0) for _ in range(2)]
            assert torch.equal(*gradients)
