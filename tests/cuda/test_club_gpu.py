"""CLUB on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from club_cases import ClubCases
from gpu import randn, through_gpu

import oodkern
from oodkern import reference

pytestmark = pytest.mark.gpu


class TestGpuClub(ClubCases):
    function = staticmethod(through_gpu(oodkern.club))


def tensors(N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    return [randn(N, D, dtype=dtype, seed=seed + i) / 3 for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows_and_columns(dtype):
    """As many slices as there are multiprocessors for, and as long ones as a warp adds up."""
    for N, D in ((1024, 512), (300_000, 40), (100, 5000)):
        leaves = [tensor.requires_grad_() for tensor in tensors(N, D, dtype)]
        value = oodkern.club(*leaves)
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        oracle = reference.club(*exact)
        torch.testing.assert_close(value.double(), oracle, rtol=1e-4, atol=1e-5 * D)
        eps = torch.finfo(dtype).eps
        least = torch.finfo(dtype).tiny * eps  # float16 rounds gradients of 1 / N to multiples of it
        for a, b in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(oracle, exact), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2 * eps + 1e-5, atol=(eps + 1e-5) / N + least)


def test_offsets_of_64_bits():
    """More than 2^31 elements a matrix; rows behind the first 2^31 have a part in value and gradient."""
    N, D = 2**21 + 8, 1024
    if torch.cuda.mem_get_info()[0] < 5 * 2 * N * D:
        pytest.skip("needs 22 GB of free memory")
    mean = torch.zeros(1, 1, dtype=torch.bfloat16, device="cuda").expand(N, D)
    target = torch.zeros(N, D, dtype=torch.bfloat16, device="cuda")
    target[-1, -1] = 1.0
    value, columns = torch.ops.oodkern.club(mean, mean, target)
    c, v = 1 - 1 / N, 1 / N - 1 / N**2
    # One column has a variance; all weights are 1.
    torch.testing.assert_close(columns[:, -1].cpu(), torch.tensor([1 / N, 0.0, v, 1.0, -1 / N]), rtol=1e-3, atol=1e-8)
    one = torch.full((), float(N), device="cuda")
    gradient = torch.ops.oodkern.club_backward(one, mean, mean, target, columns, True, False, False)[0]
    assert gradient[-1, -1].item() == pytest.approx(c, rel=1e-2)
    assert value.isfinite()


def test_other_devices_are_refused():
    mean, log_variance, target = tensors(4, 5)
    with pytest.raises(RuntimeError, match="target: expected the device of mean"):
        torch.ops.oodkern.club(mean, log_variance, target.cpu())


def test_compile_and_opcheck():
    torch._dynamo.reset()
    inputs = tensors(6, 33)
    compiled = torch.compile(oodkern.club, fullgraph=True)
    assert torch.equal(compiled(*inputs), oodkern.club(*inputs))
    torch.library.opcheck(torch.ops.oodkern.club.default, tuple(inputs))
