"""The pairwise hinge on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from gpu import randn, through_gpu
from oracle import like
from pairwise_hinge_cases import HingeCases

import oodkern

pytestmark = pytest.mark.gpu


class TestGpuHinge(HingeCases):
    function = staticmethod(through_gpu(oodkern.pairwise_hinge))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_many_scores(dtype):
    """Sets that PyTorch sorts in another way than small ones, against counts of the CPU's kernel."""
    for N, M in ((4096, 100_000), (1_000_000, 3), (70_000, 70_001)):
        pair = [randn(N, dtype=dtype), randn(M, dtype=dtype, seed=1)]
        ours = torch.ops.oodkern.pairwise_hinge(*pair, 0.5)
        exact = torch.ops.oodkern.pairwise_hinge(*[tensor.cpu().double() for tensor in pair], 0.5)
        torch.testing.assert_close(ours[0].cpu().double(), exact[0], rtol=1e-6, atol=0)
        for a, b in zip(ours[1:], exact[1:], strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=1e-6, atol=0)


def test_nan_of_either_sign():
    """Sorted by their bits, negative NaN may come first."""
    for count in (10, 5000, 200_000):
        for nan in (torch.nan, -torch.nan):
            dirty = randn(count)
            dirty[count // 2] = nan
            clean = randn(50, seed=1)
            for pair in ((dirty, clean), (clean, dirty)):
                for result in torch.ops.oodkern.pairwise_hinge(*pair, 0.0):
                    assert result.isnan().all()


def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match="ood_score: expected the device of id_score"):
        torch.ops.oodkern.pairwise_hinge(randn(4), randn(5).cpu(), 0.0)


def test_repeats_bit_for_bit_on_tensors_of_the_device():
    pair = [randn(4096).requires_grad_(), randn(100_000, seed=1).requires_grad_()]
    value = oodkern.pairwise_hinge(*pair)
    g = like(value.detach().cpu()).cuda()
    first = [value, *torch.autograd.grad(value, pair, g)]
    for _ in range(3):
        again = oodkern.pairwise_hinge(*pair)
        assert all(torch.equal(a, b) for a, b in zip(first, [again, *torch.autograd.grad(again, pair, g)], strict=True))


def test_compile_and_opcheck():
    torch._dynamo.reset()
    pair = [randn(30), randn(20, seed=1)]
    compiled = torch.compile(lambda a, b: oodkern.pairwise_hinge(a, b, 0.4), fullgraph=True)
    assert torch.equal(compiled(*pair), oodkern.pairwise_hinge(*pair, 0.4))
    torch.library.opcheck(torch.ops.oodkern.pairwise_hinge.default, (*pair, 0.5))
