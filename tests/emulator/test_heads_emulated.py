"""Room `heads` on CUDA, without a GPU: the cases of heads_cases.py, and what only the emulator can be asked."""

from __future__ import annotations

import pytest
import torch
from bar_heads import HEADS, compare, random, value_and_gradient
from emulate import ORDERS
from heads_cases import HeadsBar, LabelsBar, MendingBar
from layouts import FLOATS
from oracle import like

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")


class TestEmulatedHeads(HeadsBar):
    pass


class TestEmulatedMending(MendingBar):
    pass


class TestEmulatedLabels(LabelsBar):
    pass


@pytest.mark.parametrize("head", HEADS)
def test_every_order_gives_the_same_bits(emulated, head):
    function = HEADS[head][0]
    for shape in ((5, 40), (3, 1000), (1, 9000)):
        z, upstream = random(shape, torch.bfloat16), like(torch.empty(shape[0]))
        for told in (upstream, None):
            emulated.set()
            expected = value_and_gradient(function, z, upstream, upstream=told)
            for emulated.order in (ORDERS["descending"], ORDERS["shuffled"]):
                emulated.seed += 1
                assert all(map(torch.equal, value_and_gradient(function, z, upstream, upstream=told), expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head", HEADS)
def test_every_alignment(emulated, head, dtype):
    """Of rows and of their gradients, from one multiple of 16 bytes to the next."""
    for K in (13, 250, 1100):
        base = random((2, K + 24), dtype)
        for offset in range(0, 16 // base.element_size()):
            emulated.offset = offset * 3 % 8 * base.element_size()
            compare(head, base[:, offset : offset + K], "itself")


@pytest.mark.parametrize("head", HEADS)
def test_blocks_walk_over_rows(emulated, head):
    """More rows, or chunks of rows, than the emulator's 24 blocks take at once."""
    shapes = {(900, 3): "itself", (200, 70): "itself", (27, 1030): "itself", (9, 20_000): "another"}
    for shape, foresee in shapes.items():
        compare(head, random(shape, torch.float32), foresee)


def test_a_common_shift_of_the_logits_costs_no_accuracy():
    """logsumexp(z) - mean(z), each as large as the logits, is a difference of what lies about the maximum."""
    for K in (3000, 9000):
        z = torch.randn(2, K).mul(64).round().div(64)
        torch.testing.assert_close(oodkern.oe_head(z + 4096), oodkern.oe_head(z), rtol=2e-6, atol=0)
