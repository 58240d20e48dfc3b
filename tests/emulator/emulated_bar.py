"""The bar of a row's score in the emulator, beside what it shares with a GPU."""

from __future__ import annotations

import torch
from emulate import ORDERS
from energy_cases import CudaBar
from oracle import value_and_gradients


class EmulatedBar(CudaBar):
    """Beside the bar's: orders of threads, alignments, numbers of blocks."""

    def test_every_order_gives_the_same_bits(self, emulated, dtype):
        for shapes in (((5, 40),), ((3, 1000),), ((2, 5000),)):
            inputs = self.op.inputs(shapes, dtype)
            expected = value_and_gradients(self.op.function, inputs, order=2)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                for a, b in zip(value_and_gradients(self.op.function, inputs, 2), expected, strict=True):
                    assert torch.equal(a, b)
            emulated.set()

    def test_every_alignment(self, emulated, dtype):
        """Of rows and of their gradients, from one multiple of 16 bytes to the next."""
        for K in (13, 250, 1100):
            (base,) = self.op.inputs(((3, K + 24),), dtype)
            for offset in range(0, 16 // base.element_size()):
                emulated.offset = offset * 3 % 8 * base.element_size()
                self.compare([base[:, offset : offset + K]], order=2)

    def test_blocks_that_share_a_row(self, emulated, dtype):
        """From one block a row to as many as there is work for."""
        for emulated.multiprocessors in (1, 2, 132):
            self.compare(self.op.inputs(((2, 12001),), dtype), order=2)
        assert emulated.launched() >= {"reduce_rows", "finish_rows", "map_rows"}

    def test_blocks_walk_over_rows(self, emulated):
        """More rows than the emulator's 24 blocks take at once."""
        for shape in ((900, 3), (200, 70), (30, 1030)):
            self.compare(self.op.inputs((shape,), torch.float32), order=2)
