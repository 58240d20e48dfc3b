"""What the pairwise hinge is judged by on CUDA, in the emulator and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from layouts import FLOATS
from oracle import in_float64, value_and_gradients
from pairs import all_pairs, judge_hinge, scores
from torch import Tensor

import oodkern

# Powers of two and their neighbours, where a search has one step more; a thread's scores, a block's, and one more.
SIZES = [(5, 3), (3, 5), (1, 1), (1, 70), (70, 1), (7, 65), (64, 1025), (1024, 63), (128, 127), (513, 257)]


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    for N, M in ((3, 5), (30, 2000)):
        value_and_gradients(through(oodkern.pairwise_hinge), scores(N, M, torch.float32))


class HingeCases:
    function = staticmethod(oodkern.pairwise_hinge)

    def judge(self, pair: list[Tensor], margin: float) -> None:
        judge_hinge(pair, margin, self.function)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("margin", [0.0, 0.5, -1.0, 100.0, -100.0])
    def test_against_all_pairs(self, dtype, margin):
        for seed, (N, M) in enumerate(SIZES):
            self.judge(scores(N, M, dtype, seed), margin)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("offset", [1e4, -3e4, 1e6])
    def test_far_from_zero(self, dtype, offset):
        if dtype == torch.float16 and offset > 5e4:
            offset = 5e4
        self.judge(scores(200, 900, dtype, offset=offset), 0.5)
        self.judge(scores(900, 200, dtype, offset=offset), 0.5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_few_pairs_that_count(self, dtype):
        """Of scores that lie far away from one another: what is not in such a pair costs no digits."""
        id_score = torch.cat([torch.tensor([0.25, 0.5]), torch.full((400,), 1e20)]).to(dtype)
        ood_score = torch.cat([torch.tensor([0.375, 0.75]), torch.full((300,), -1e20)]).to(dtype)
        pair = [id_score.requires_grad_(), ood_score.requires_grad_()]
        value = self.function(*pair, 0.0)
        exact = (0.125 + 0.5 + 0.25) / (402 * 302)
        assert value.item() == pytest.approx(exact, rel=1e-6)
        self.judge([tensor.detach()[:2] for tensor in pair], 0.0)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_ties(self, dtype):
        """Few values, so that many pairs are at the hinge itself, where the slope is 0."""
        generator = torch.Generator().manual_seed(3)
        for values in ((-1.0, 0.0, 1.0), (0.5, 0.25, -0.0, 0.0), (1000.0, 1000.5), (3.0,)):
            for margin in (0.0, 0.5, -1.0, 0.1):
                drawn = [torch.randint(len(values), (size,), generator=generator) for size in (37, 50)]
                self.judge([torch.tensor(values, dtype=dtype)[places] for places in drawn], margin)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_sign_of_a_pair_is_exact(self, dtype):
        """Scores one unit in the last place above, at and below the other less the margin."""
        base = torch.cat([torch.randn(3, dtype=dtype), torch.tensor([0.0, -0.0, 1e-40, -1e-40], dtype=dtype)])
        for margin in (0.0, 0.1, -0.7, 1e-30, 1e-46, 3e7):
            at = (base.double() + margin).to(dtype)
            for id_score in (at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1)):
                pair = [id_score.clone().requires_grad_(), base.clone().requires_grad_()]
                gradients = torch.autograd.grad(self.function(*pair, margin), pair)
                active = base.double()[None] + margin > id_score.double()[:, None]  # in float64
                counts = [-active.sum(1) / active.numel(), active.sum(0) / active.numel()]
                for gradient, count in zip(gradients, counts, strict=True):
                    torch.testing.assert_close(gradient, count.to(dtype), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_layouts(self, dtype):
        for kind in ("every other", "offset", "expanded"):
            pair = scores(70, 90, dtype)
            pair = {
                "every other": lambda p: [torch.stack([t, t + 7], 1)[:, 0] for t in p],
                "offset": lambda p: [torch.cat([t, t])[1 : len(t)] for t in p],
                "expanded": lambda p: [t[:1].expand(len(t)) for t in p],
            }[kind](pair)
            self.judge(pair, 0.25)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
    def test_empty(self, sizes, dtype):
        leaves = [tensor.requires_grad_() for tensor in scores(*sizes, dtype)]
        value = self.function(*leaves, 1.0)
        assert value == 0
        for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
            assert gradient.shape == leaf.shape
            assert (gradient == 0).all()

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("flip", [False, True])
    def test_infinities_and_nan(self, dtype, flip):
        inf, nan = math.inf, math.nan
        cases = [
            ([1.0, inf], [0.0, 2.0]), ([1.0, 2.0], [0.0, -inf]), ([1.0, -inf], [0.0, 2.0]), ([1.0, 2.0], [inf, 0.0]),
            ([inf, inf], [0.0, 2.0]), ([inf, 1.0], [inf, 0.0]), ([-inf, 1.0], [-inf, 0.0]), ([-inf, inf], [1.0, 2.0]),
            ([nan, 1.0], [0.0, 2.0]), ([1.0, 2.0], [0.0, nan]), ([1.0, 2.0], [-nan, 0.0]), ([-inf], [-inf]),
            ([inf], [-inf]), ([-inf], [inf]), ([inf, inf, 1.0], [0.5, 2.0]), ([1.0, 0.0, -inf], [-inf, 3.0, inf]),
        ]  # fmt: skip
        for a, b in cases:
            id_score, ood_score = (a * 3, b) if flip else (a, b * 3)
            pair = [torch.tensor(part, dtype=dtype) for part in (id_score, ood_score)]
            ours = value_and_gradients(lambda x, y: self.function(x, y, 0.5), pair)
            exact = in_float64(lambda x, y: all_pairs(x, y, 0.5), pair)
            torch.testing.assert_close(ours[0].double(), exact[0], equal_nan=True)
            if exact[0].isnan():
                assert all(gradient.isnan().all() for gradient in ours[1:])
                continue
            for x, y in zip(ours[1:], exact[1:], strict=True):
                torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=0)

    def test_gradcheck(self):
        leaves = [tensor.requires_grad_() for tensor in scores(9, 12, torch.float64)]
        assert torch.autograd.gradcheck(lambda a, b: self.function(a, b, 0.3), leaves, eps=1e-7)
        assert torch.autograd.gradgradcheck(lambda a, b: self.function(a, b, 0.3).sin(), leaves)
