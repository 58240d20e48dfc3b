"""The bytes that a meter counts, against counts by hand."""

import runpy
import sys

import torch
from torch import nn

from oodkern.ops import _checks
from oodkern.training.meter import WORK, Meter, WorstCase


def test_the_meter_counts_a_linear_layer_to_the_byte():
    N, D, K = 37, 50, 21
    layer, rows, upstream = nn.Linear(D, K, bias=False), torch.randn(N, D), torch.randn(N, K)
    meter = Meter()
    meter.hold(layer.parameters(), "parameters")
    meter.hold_gradients(layer.parameters(), "gradients")
    with meter:
        made = layer(rows)
        assert meter.peak == 4 * (K * D + N * D + N * K)
        made.backward(upstream)
    assert meter.peak == 4 * (2 * K * D + N * D + 2 * N * K)
    assert meter.by_kind == {"parameters": 4 * K * D, "gradients": 4 * K * D, WORK: 4 * (N * D + 2 * N * K)}
    del made, rows, upstream
    assert meter.live == 4 * 2 * K * D
    assert meter.peak == 4 * (2 * K * D + N * D + 2 * N * K)
    layer.zero_grad()
    assert (meter.live, meter.by_kind["gradients"]) == (4 * K * D, 0)


def test_the_meter_counts_what_autograd_saves_until_it_is_used():
    x = torch.randn(1000, requires_grad=True)
    meter = Meter()
    with meter:
        y = x.exp().exp()  # of which the first result is saved, and has no name
        assert meter.live == 4 * 3000
        (gradient,) = torch.autograd.grad(y, x, torch.randn(1000))
        assert meter.live == 4 * 3000, "x, y and the gradient; what was saved and what was multiplied is gone"
    assert meter.peak > 4 * 4000
    assert len(gradient) == 1000


def test_the_meter_counts_storages_not_tensors():
    with Meter(block=512) as meter:
        whole = torch.empty(100)  # 400 bytes
        views = whole[10:20], whole.view(10, 10), whole.add_(1), torch.empty(1 << 20, device="meta")
        assert meter.live == meter.peak == 512
    assert len(views) == 4


def test_without_the_private_module_nothing_is_taken_for_fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    assert runpy.run_path(_checks.__file__)["is_fake"](torch.ones(1)) is False


def test_numbers_that_are_not_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), WorstCase():
        rows = torch.empty(5, 3)
        assert tuple(rows.nonzero().shape) == (15, 2)
        assert (rows[0, 0].item(), int(rows.long().max()), bool((rows > 0).all())) == (1.0, 1, True)
