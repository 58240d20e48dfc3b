"""Room `heads` on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from bar_heads import HEADS, MARGIN, labels
from gpu import randn, through_gpu
from heads_cases import HeadsBar, LabelsBar, MendingBar
from oracle import like

import oodkern

pytestmark = pytest.mark.gpu


class TestGpuHeads(HeadsBar):
    through = staticmethod(through_gpu)


class TestGpuMending(MendingBar):
    through = staticmethod(through_gpu)


class TestGpuLabels(LabelsBar):
    through = staticmethod(through_gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("K", [13, 250, 1100, 20_001])
def test_views_are_read_in_place(head, K, dtype):
    """Every alignment of rows; labels lie beside logits."""
    function, oracle, _ = HEADS[head]
    base, g = randn(3, K + 24, dtype=dtype), randn(3, seed=1)
    eps = torch.finfo(dtype).eps
    for offset in range(0, 8, 3):
        leaf = base[:, offset : offset + K].detach().requires_grad_()
        value = function(leaf, upstream=g)
        exact = base[:, offset : offset + K].double().requires_grad_()
        known = oracle(exact)
        torch.testing.assert_close(value.double(), known, rtol=1e-4, atol=1e-4)
        (ours,), (slope,) = torch.autograd.grad(value, leaf, g), torch.autograd.grad(known, exact, g.double())
        torch.testing.assert_close(ours.double(), slope, rtol=2 * eps + 1e-3, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("K", [10, 1000, 20_000])
def test_cuda_graph(head, K):
    """Captured with its backward pass and replayed on new logits: nothing waits for the device."""
    function = HEADS[head][0]
    if head == "bce":
        y = labels(torch.empty(4, K, device="cuda"))
        function = lambda z, **named: oodkern.bce_head(z, y, **named)  # noqa: E731
    z, told = randn(4, K).requires_grad_(), randn(4, seed=1)
    other = randn(4, K, seed=5)

    def step(told):
        return torch.autograd.grad(function(z, upstream=told), z, told)[0]

    for foreseen in (told, None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.autograd.grad(function(z, upstream=foreseen), z, told)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = function(z, upstream=foreseen)
            (gradient,) = torch.autograd.grad(value, z, told)
        with torch.no_grad():
            z.copy_(other)
        graph.replay()
        torch.testing.assert_close(value, function(z.detach()), rtol=0, atol=0)
        torch.testing.assert_close(gradient, step(told), rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_nothing_waits_for_the_device(head):
    function = HEADS[head][0]
    z, told = randn(64, 1000, dtype=torch.bfloat16).requires_grad_(), randn(64, seed=1)
    y = labels(z)
    function = (lambda z, **named: oodkern.bce_head(z, y, **named)) if head == "bce" else function
    try:
        torch.cuda.set_sync_debug_mode("error")
        for grad in (told, 2 * told):
            torch.autograd.grad(function(z, upstream=told), z, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_devices_are_refused():
    z, one = randn(4, 5), torch.ones(4)
    with pytest.raises(RuntimeError, match="grad: expected the device of logits"):
        torch.ops.oodkern.head_backward("oe", one, z, None, 0.0, torch.ones(4, 3, device="cuda"))
    with pytest.raises(RuntimeError, match="rows: expected the device of logits"):
        torch.ops.oodkern.head_backward("oe", one.cuda(), z, None, 0.0, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="target: expected the device of logits"):
        torch.ops.oodkern.head("bce", z, torch.ones(4, 5), 0.0, None)
    with pytest.raises(RuntimeError, match="upstream: expected the device of logits"):
        torch.ops.oodkern.head("oe", z, None, 0.0, one)


def test_offsets_of_64_bits():
    """More than 2^31 elements, in short rows and in one long one."""
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 4 * 2 * count:
        pytest.skip("needs 17 GB of free memory")
    z = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    for shape in ((-1, 1024), (1, -1)):
        rows = z.view(shape)
        rows[-1, -1] = 40.0
        upstream = torch.ones(len(rows), device="cuda")
        value, _, gradient = torch.ops.oodkern.head("energy_out", rows, None, -39.0, upstream)
        assert value[-1].item() == pytest.approx(1.0, abs=1e-3)
        assert gradient[-1, -1].item() == pytest.approx(2.0, abs=1e-2)
        del gradient
        value, _, gradient = torch.ops.oodkern.head("bce", rows, torch.ones_like(rows, dtype=torch.bool), 0.0, upstream)
        known = (rows.shape[1] - 1) / rows.shape[1] * 0.693147
        assert value[-1].item() == pytest.approx(known, rel=1e-3)
        assert abs(gradient[-1, -1].item()) < 1e-15
        assert gradient[-1, -2].item() == pytest.approx(-0.5 / rows.shape[1], rel=1e-2)
        del gradient


@pytest.mark.parametrize("head", HEADS)
def test_compile_func_and_opcheck(head):
    torch._dynamo.reset()
    function, z = HEADS[head][0], randn(6, 33)
    y = labels(z)
    one = (lambda t: oodkern.bce_head(t, y)) if head == "bce" else function
    assert torch.equal(torch.compile(one, fullgraph=True)(z), one(z))
    target, name = y if head == "bce" else None, head.replace(" ", "_")
    value, rows, gradient = torch.ops.oodkern.head(name, z, target, MARGIN, randn(6, seed=1))
    torch.library.opcheck(torch.ops.oodkern.head.default, (name, z, target, MARGIN, value))
    torch.library.opcheck(torch.ops.oodkern.head_backward.default, (name, value, z, target, MARGIN, rows))
    mended = (name, gradient, value, 2 * value, z, target, MARGIN, rows)
    torch.library.opcheck(torch.ops.oodkern.head_mend.default, mended)
    batch = randn(4, 6, 5)
    slope = torch.func.grad(lambda t: function(t).sum())
    if head != "bce":  # whose labels here are those of a shape
        torch.testing.assert_close(torch.func.vmap(slope)(batch), slope(batch), rtol=0, atol=0)


def test_repeats_bit_for_bit_on_tensors_of_the_device():
    for shape in ((257, 1000), (3, 30_000)):
        z = randn(*shape)
        g = like(torch.empty(shape[0])).cuda()
        first = torch.ops.oodkern.head("oe", z, None, 0.0, g)
        for _ in range(3):
            assert all(map(torch.equal, torch.ops.oodkern.head("oe", z, None, 0.0, g), first))
