"""Room `norm` on CUDA, without a GPU: the bar's numbers, computed by the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulated_bar import EmulatedBar
from norm_cases import NormBar, norm_op
from oracle import assert_two_sided, in_float64, like, value_and_gradients

import oodkern
from oodkern import reference

pytestmark = pytest.mark.usefixtures("emulated")


class TestEmulatedNorm(NormBar, EmulatedBar):
    op = norm_op()


def test_images_of_any_layout(emulated):
    x = like(torch.empty(6, 3, 8, 10), seed=2)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, 1:-1, 1:-1], x[:1].expand(4, -1, -1, -1)):
        ours = value_and_gradients(oodkern.sample_norm, [view], order=2)
        oracle = in_float64(reference.sample_norm, [view], order=2)
        for a, b in zip(ours, oracle, strict=True):
            a, b = (t.flatten(1) if t.dim() > 1 else t for t in (a, b))
            assert_two_sided(a, b, b, rows=a.dim() > 1, condition=16.0)
    assert emulated.launched() == {"warp_rows"}
