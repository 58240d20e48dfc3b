"""CLUB on CUDA, without a GPU: its kernels and their host code in the emulator."""

from __future__ import annotations

import pytest
import torch
from club_cases import ClubCases, inputs
from emulate import ORDERS
from oracle import value_and_gradients

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")


class TestEmulatedClub(ClubCases):
    def test_every_order_gives_the_same_bits(self, emulated, dtype):
        for N, D in ((40, 9), (70, 40)):
            tensors = inputs(N, D, dtype)
            expected = value_and_gradients(oodkern.club, tensors)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                for a, b in zip(value_and_gradients(oodkern.club, tensors), expected, strict=True):
                    assert torch.equal(a, b)
            emulated.set()

    def test_results_at_any_offset(self, emulated, dtype):
        tensors = inputs(9, 48, dtype)
        for emulated.offset in range(0, 16, tensors[0].element_size()):
            if emulated.offset % 8 == 0 or dtype.itemsize == 2:  # float64 workspaces begin there too
                self.judge(tensors)

    def test_numbers_of_slices(self, emulated, dtype):
        """From as few as a warp's longest sums allow to more than the emulator runs blocks."""
        for emulated.multiprocessors, N in ((1, 2100), (2, 600), (132, 900)):
            self.judge(inputs(N, 3, dtype))


def test_launches(emulated):
    value_and_gradients(oodkern.club, inputs(9, 5, torch.float32))
    assert emulated.launched() == {"club_slices", "club_columns", "club_value", "club_gradients"}
    oodkern.club(*inputs(0, 5, torch.float32))
    assert emulated.launched() == {"club_columns", "club_value"}
