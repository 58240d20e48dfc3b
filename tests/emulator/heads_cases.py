"""What room `heads` is judged by on CUDA, in the emulator and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from bar_heads import HEADS, MARGIN, compare, labels, random, value_and_gradient
from layouts import FLOATS
from oracle import assert_two_sided, like
from torch import Tensor

import oodkern
from oodkern import reference
from oodkern.ops import heads

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Rows in the registers of 8 lanes, of 32 and of a block, and longer ones; one element more or less.
SHAPES = [(3, 5), (2, 3, 4), (1, 1), (7, 1), (35, 10), (3, 65), (5, 256), (2, 257), (2, 1000), (2, 1024), (2, 1025)]
SHAPES += [(9,), (1, 9000)]


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    for function, _, _ in HEADS.values():
        for shape in ((3, 5), (2, 1000), (1, 9000)):
            z, upstream = torch.zeros(shape), torch.ones(shape[:-1])
            for foreseen in (upstream, -upstream, None):
                value_and_gradient(through(function), z, upstream, upstream=foreseen)


@pytest.mark.parametrize("head", HEADS)
class HeadsBar:
    """The numbers of every head, computed through `through`."""

    @staticmethod
    def through(function: Callable) -> Callable:
        return function

    @pytest.mark.parametrize("foresee", ["itself", "another"])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_value_and_gradient_against_float64(self, head: str, dtype: torch.dtype, foresee: str) -> None:
        """The gradient formed with the value, and formed anew."""
        for seed, shape in enumerate(SHAPES):
            compare(head, random(shape, dtype, seed), foresee, self.through)

    def test_a_value_alone(self, head: str) -> None:
        function = self.through(HEADS[head][0])
        for shape in ((5, 40), (2, 9000)):
            z = random(shape, torch.float32)
            assert torch.equal(function(z), value_and_gradient(function, z, torch.ones(shape[0]))[0])

    def test_strides_are_seen(self, head: str) -> None:
        base = random((6, 9, 34), torch.float32)
        views = [base[:, :, ::2], base[::2], base.transpose(0, 1), base[1:, 2:, 3:], base[:1].expand(5, 9, 34)]
        for view in [*views, base[:, :1].expand(6, 4, 34), base[..., :1].expand(6, 9, 7), base[0, 0]]:
            compare(head, view, "itself", self.through)

    def test_upstreams_of_stride_0(self, head: str) -> None:
        function = self.through(HEADS[head][0])
        for shape in ((5, 40), (2, 9000)):
            z = random(shape, torch.float32)
            for foreseen in (0.5, 0.25):
                dense = torch.full(shape[:1], 0.5)
                value, gradient = value_and_gradient(function, z, dense, upstream=dense)
                again = value_and_gradient(function, z, torch.tensor(0.5).expand(shape[0]), upstream=foreseen)
                assert torch.equal(again[0], value)
                # Formed for a quarter it is multiplied by two, or formed anew.
                torch.testing.assert_close(again[1], gradient, rtol=1e-5, atol=1e-7)

    def test_empty(self, head: str) -> None:
        function, oracle, _ = HEADS[head]
        for shape, dtype in itertools.product(((0, 5), (0, 0), (3, 0), (4, 0, 5), (1,)), FLOATS):
            z = random(shape, dtype)
            value, gradient = value_and_gradient(self.through(function), z, torch.ones(shape[:-1]))
            assert gradient.shape == shape
            torch.testing.assert_close(value.double(), oracle(z.double()), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_blocks_of_a_row_differ_in_magnitude(self, head: str, dtype: torch.dtype) -> None:
        """Of three chunks of a block, each the largest and each the smallest."""
        third = 8192 if dtype != torch.float64 else 4096
        for order in ((-90.0, 0.0, 90.0), (90.0, -90.0, 0.0)):
            z = random((1, 3 * third - 5), torch.float64)
            z += torch.tensor(order, dtype=torch.float64).repeat_interleave(third)[: z.shape[1]]
            compare(head, z.to(dtype), "itself", self.through)

    @pytest.mark.parametrize("K", [7, 300, 1500, 20_000])
    def test_infinities_and_nan(self, head: str, K: int) -> None:
        """In a row each, at its beginning, middle or end."""
        function, oracle, _ = HEADS[head]
        z = random((7, K), torch.float32)
        z[1], z[2, 0], z[3, K - 1], z[4, K // 2] = -torch.inf, -torch.inf, 1e4, -1e4
        exact, slope = value_and_gradient(oracle, z.double(), torch.ones(7))
        z[5, K - 2], z[6, K - 1] = torch.nan, torch.inf
        for foreseen in (1.0, 2.0):
            value, gradient = value_and_gradient(self.through(function), z, torch.ones(7), upstream=foreseen)
            torch.testing.assert_close(value[:5].double(), exact[:5], rtol=2e-5, atol=1e-5)
            torch.testing.assert_close(gradient[:5].double(), slope[:5], rtol=1e-4, atol=1e-5)
            assert value[5].isnan()
            assert gradient[5, K - 2].isnan()
            known = oracle(z.double())[6]
            torch.testing.assert_close(value[6].double(), known, rtol=2e-5, atol=1e-5, equal_nan=True)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_repeats_bit_for_bit(self, head: str, dtype: torch.dtype) -> None:
        function = self.through(HEADS[head][0])
        for shape in ((3, 40), (3, 1000), (1, 9000)):
            z = random(shape, dtype)
            upstream = like(torch.empty(shape[0]))
            first = value_and_gradient(function, z, upstream)
            assert all(map(torch.equal, value_and_gradient(function, z, upstream), first))


@pytest.mark.parametrize("head", HEADS)
class MendingBar:
    """Gradients that were formed for a foreseen upstream: rows of another one are formed anew, where they are."""

    @staticmethod
    def through(function: Callable) -> Callable:
        return function

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(heads, "would_wait", lambda tensor: True)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_other_rows_are_left_alone(self, head: str, dtype: torch.dtype) -> None:
        def mended(z: Tensor, gradient: Tensor, grad: Tensor, foreseen: Tensor) -> tuple[Tensor, Tensor]:
            name, target = head.replace(" ", "_"), labels(z) if head == "bce" else None
            _, rows, _ = heads.raw("native", "head", name, z, target, MARGIN, None)
            heads.raw("native", "head_mend", name, gradient, grad, foreseen, z, target, MARGIN, rows)
            return gradient, heads.raw("native", "head_backward", name, grad, z, target, MARGIN, rows)

        for shape in ((40, 3), (9, 40), (9, 257), (9, 1000), (5, 9000)):
            z = random(shape, dtype)
            foreseen = like(torch.empty(shape[0], dtype=torch.promote_types(dtype, torch.float32)))
            other = torch.arange(shape[0]) % 4 == 1
            eps = torch.finfo(foreseen.dtype).eps
            grad = torch.where(other, foreseen * (1 + 6 * eps), foreseen * (1 + eps))
            marked = torch.full(shape, 7.0, dtype=dtype)
            gradient, expected = self.through(mended)(z, marked, grad, foreseen)
            assert torch.equal(gradient[other], expected[other])
            assert (gradient[~other] == 7).all()
            grad[other] = torch.nan
            gradient, _ = self.through(mended)(z, marked, grad, foreseen)
            assert gradient[other].isnan().all()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_a_backward_pass_looks_at_no_number(self, head: str, dtype: torch.dtype) -> None:
        function = self.through(HEADS[head][0])
        for shape in ((24, 50), (3, 1500)):
            z = random(shape, dtype)
            told = like(torch.empty(shape[0], dtype=torch.promote_types(dtype, torch.float32)))
            for factor in (1.0, 4.0, 1.5):
                grad = told.clone()
                grad[1:] *= factor
                expected = value_and_gradient(function, z, grad)
                assert all(map(torch.equal, value_and_gradient(function, z, grad, upstream=told), expected))


class LabelsBar:
    """The labels of the binary head."""

    @staticmethod
    def through(function: Callable) -> Callable:
        return function

    def bce(self, z: Tensor, y: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        head = self.through(lambda t, y, **named: oodkern.bce_head(t, y, **named))
        return value_and_gradient(lambda t, **named: head(t, y, **named), z, upstream, upstream=upstream)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_targets_of_every_dtype(self, dtype: torch.dtype) -> None:
        """The same labels, whatever they are stored as, at any address: read in words and one by one."""
        for shape in ((5, 17), (2, 1100)):
            z, upstream = (
                random(shape, dtype),
                like(torch.empty(shape[0], dtype=torch.promote_types(dtype, torch.float))),
            )
            first = self.bce(z, labels(z), upstream)
            for kind in (*FLOATS, *INTEGERS):
                y = labels(z, kind)
                spread = torch.zeros(shape[0], shape[1] + 3, dtype=kind)
                spread[:, 3:] = y
                for view in (y, spread[:, 3:]):
                    assert all(map(torch.equal, first, self.bce(z, view, upstream))), kind

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_labels_between_0_and_1(self, dtype: torch.dtype) -> None:
        z, upstream = random((4, 33), dtype), like(torch.empty(4, dtype=torch.promote_types(dtype, torch.float)))
        soft = torch.rand(4, 33, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for kind in FLOATS:
            y = soft.to(kind)
            value, gradient = self.bce(z, y, upstream)
            known = y.to(value.dtype).double()
            exact, slope = value_and_gradient(lambda t, y=known: reference.bce_head(t, y), z.double(), upstream)
            assert_two_sided(value, exact, exact)
            size = torch.full_like(slope, 1 / 33) * upstream.double().abs().unsqueeze(-1)
            assert_two_sided(gradient, slope, slope, "gradient", rows=True, size=size)

    def test_labels_leave_nothing_to_cancel(self) -> None:
        """One logit and its label: also where softplus(z) - z and sigmoid(z) - 1 round to 0."""
        z = torch.linspace(-80, 80, 321)[:, None]
        for label in (0.0, 1.0):
            value, gradient = self.bce(z, torch.full_like(z, label), torch.ones(321))
            off = (1 - 2 * label) * z.double()
            exact = off.clamp_min(0) + (-off.abs()).exp().log1p()
            torch.testing.assert_close(value.double(), exact.squeeze(1), rtol=2e-6, atol=0)
            torch.testing.assert_close(gradient.double(), (1 - 2 * label) * off.sigmoid(), rtol=2e-6, atol=0)

    def test_infinite_logits_and_their_labels(self) -> None:
        inf = torch.inf
        z, y = torch.tensor([[inf], [-inf], [inf], [-inf]]), torch.tensor([[1], [0], [0], [1]])
        value, gradient = self.bce(z, y, torch.full((4,), 0.5))
        assert value.tolist() == [0.0, 0.0, inf, inf]
        assert gradient.squeeze(1).tolist() == [0.0, 0.0, 0.5, -0.5]

    def test_targets_expanded_over_rows(self) -> None:
        z, y = torch.randn(6, 9), labels(torch.empty(9))
        expanded, dense = (self.bce(z, one, torch.ones(6)) for one in (y.expand(6, 9), y.repeat(6, 1)))
        assert all(map(torch.equal, expanded, dense))
