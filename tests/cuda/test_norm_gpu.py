"""Room `norm` on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from gpu import randn, through_gpu
from norm_cases import NormBar, norm_op

import oodkern
from oodkern import reference

pytestmark = pytest.mark.gpu


class TestGpuNorm(NormBar):
    op = norm_op(through_gpu)


def test_channels_last_is_read_in_place():
    x = randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    norm = oodkern.sample_norm(x)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes // 8
    (gradient,) = torch.autograd.grad(norm.sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm.detach(), reference.sample_norm(x.detach()))


def test_offsets_of_64_bits():
    """More than 2^31 elements, in short rows and in one long one."""
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of free memory")
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    for shape in ((-1, 1024), (1, -1)):
        rows = x.view(shape)
        rows[-1, -1] = 40.0
        norm = oodkern.sample_norm(rows)
        assert norm[-1].item() == 40
        gradient = torch.ops.oodkern.sample_norm_backward(torch.ones_like(norm), rows, norm)
        assert gradient[-1, -1].item() == 1
        assert gradient.count_nonzero() == 1


def test_repeats_bit_for_bit_on_tensors_of_the_device():
    for shape in ((257, 1000), (3, 300_000)):
        x = randn(*shape)
        first = oodkern.sample_norm(x)
        assert all(torch.equal(oodkern.sample_norm(x), first) for _ in range(3))


def test_other_devices_are_refused():
    x = randn(4, 5)
    with pytest.raises(RuntimeError, match="norm: expected the device of x"):
        torch.ops.oodkern.sample_norm_backward(torch.ones(4, device="cuda"), x, torch.ones(4))
