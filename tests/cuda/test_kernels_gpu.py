"""Every kernel of csrc/cuda on a real device, by the names that the profiler saw."""

from __future__ import annotations

import pytest
import torch
from gpu import through_gpu
from kernel_cases import kernels, launch_every_kernel

pytestmark = pytest.mark.gpu


def test_every_kernel_runs(root):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        launch_every_kernel(through_gpu)
        torch.cuda.synchronize()
    names = " ".join(event.key for event in recorded.key_averages())
    for kernel in sorted(kernels(root)):
        assert f"::{kernel}<" in names or f"::{kernel}(" in names, kernel
