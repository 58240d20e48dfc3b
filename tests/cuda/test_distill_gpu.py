"""Room `distill` on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from distill_cases import DistillBar
from gpu import randn, through_gpu

import oodkern

pytestmark = pytest.mark.gpu


class TestGpuDistillation(DistillBar):
    function = staticmethod(through_gpu(oodkern.distillation))


def test_offsets_of_64_bits():
    """More than 2^31 elements, in short rows and in one long one."""
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * 2 * count:
        pytest.skip("needs 18 GB of free memory")
    student, teacher = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for shape in ((-1, 1024), (1, -1)):
        s, t = student.view(shape), teacher.view(shape)
        s[-1, -1] = 40.0
        value, shares = torch.ops.oodkern.distillation(s, t, 1.0)
        K = s.shape[1]
        # q of the last class is nearly 1, p is uniform: KL = sum p (log p - log q) = 40 (1 - 1 / K) - log K, nearly.
        expected = 40 * (1 - 1 / K) - torch.tensor(float(K)).log().item()
        assert value[-1].item() == pytest.approx(expected, rel=1e-4)
        gradient = torch.ops.oodkern.distillation_backward(torch.ones_like(value), s, t, shares, 1.0)
        assert gradient[-1, -1].item() == pytest.approx(1 - 1 / K, rel=1e-2)
        s[-1, -1] = 0.0


def test_repeats_bit_for_bit_on_tensors_of_the_device():
    for shape in ((257, 1000), (3, 300_000)):
        student, teacher = randn(*shape), randn(*shape, seed=1)
        first = oodkern.distillation(student, teacher)
        assert all(torch.equal(oodkern.distillation(student, teacher), first) for _ in range(3))


def test_other_devices_are_refused():
    student, shares = randn(4, 5), torch.ones(4, 4, device="cuda")
    with pytest.raises(RuntimeError, match="teacher_logits: expected the device of student_logits"):
        torch.ops.oodkern.distillation(student, student.cpu(), 1.0)
    with pytest.raises(RuntimeError, match="shares: expected the device of student_logits"):
        torch.ops.oodkern.distillation_backward(shares[0], student, student, shares.cpu(), 1.0)
