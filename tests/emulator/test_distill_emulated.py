"""Room `distill` on CUDA, without a GPU: its numbers, computed by the kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from distill_cases import DistillBar
from emulate import ORDERS
from oracle import value_and_gradients
from room_distill import compare, pair

import oodkern

pytestmark = pytest.mark.usefixtures("emulated")

FLOAT32 = (torch.float32, torch.float32)


class TestEmulatedDistillation(DistillBar):
    function = staticmethod(oodkern.distillation)

    @pytest.mark.parametrize("dtypes", [FLOAT32, (torch.float16, torch.bfloat16), (torch.float64, torch.float64)])
    def test_every_order_gives_the_same_bits(self, emulated, dtypes):
        for shape in ((5, 40), (3, 1000), (2, 9000)):
            student, teacher = pair(shape, dtypes)
            results = []
            for emulated.order in ORDERS.values():
                emulated.seed += 1
                results.append(value_and_gradients(lambda s, t=teacher: oodkern.distillation(s, t), [student]))
            for other in results[1:]:
                assert all(map(torch.equal, other, results[0]))
        assert emulated.launched() == {"distillation_rows", "distillation_gradient"}

    @pytest.mark.parametrize("dtypes", [FLOAT32, (torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
    def test_results_at_any_address(self, emulated, dtypes):
        for K in (12, 200, 1100):
            student, teacher = pair((3, K), dtypes)
            for emulated.offset in range(4, 16, 4):
                compare(student, teacher)

    def test_blocks_walk_over_rows(self):
        """More rows than the emulator's 24 blocks take at once."""
        for shape in ((900, 3), (200, 70), (30, 1030)):
            compare(*pair(shape, FLOAT32))

    def test_nan_stays_in_its_row(self):
        for K in (40, 1500):
            student, teacher = pair((5, K), FLOAT32)
            clean = value_and_gradients(lambda s, t=teacher: oodkern.distillation(s, t), [student])
            others = torch.tensor([0, 1, 3, 4])
            for which in (student, teacher):
                kept, which[2, K - 1] = which[2, K - 1].clone(), torch.nan
                dirty = value_and_gradients(lambda s, t=teacher: oodkern.distillation(s, t), [student])
                which[2, K - 1] = kept
                assert dirty[0][2].isnan()
                assert all(torch.equal(a[others], b[others]) for a, b in zip(dirty, clean, strict=True))
