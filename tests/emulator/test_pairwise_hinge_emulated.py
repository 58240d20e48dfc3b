"""The pairwise hinge on CUDA, without a GPU: its kernels and their host code in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulate import ORDERS
from layouts import FLOATS
from oracle import value_and_gradients
from pairs import scores
from pairwise_hinge_cases import HingeCases

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")


class TestEmulatedHinge(HingeCases):
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_every_order_gives_the_same_bits(self, emulated, dtype):
        for N, M in ((30, 1500), (2100, 5)):
            pair = scores(N, M, dtype)
            expected = value_and_gradients(oodkern.pairwise_hinge, pair)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                for a, b in zip(value_and_gradients(oodkern.pairwise_hinge, pair), expected, strict=True):
                    assert torch.equal(a, b)
            emulated.set()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_results_at_any_offset(self, emulated, dtype):
        for emulated.offset in (0, 8) if dtype == torch.float64 else (0, 8, 12, 4):
            self.judge(scores(70, 90, dtype), 0.5)

    def test_blocks_walk_over_groups(self, emulated):
        """More scores than the emulator's 24 blocks take at once."""
        self.judge(scores(300, 30_000, torch.float32), 0.5)
        self.judge(scores(15_000, 200, torch.float64), 0.5)
