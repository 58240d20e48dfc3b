"""The stream engine on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from gpu import randn, through_gpu
from oracle import like
from stream_cases import DTYPES, LONG_SIZES, OPS, SIZES, head, judge

import oodkern
from oodkern import backends, reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_against_float64(dtype, name):
    """More columns than shared memory holds of 192 classes are among the last."""
    beside_48_kilobytes = (300, 384, 40), (300, 1536, 10), (300, 128, 150)  # of classes, and some constants
    for sizes in (*SIZES, *LONG_SIZES, *beside_48_kilobytes, (300, 3000, 192), (300, 2048, 100), (5000, 512, 100)):
        judge(name, head(*sizes, dtype), through_gpu)


@pytest.mark.parametrize("name", OPS)
def test_views_are_read_in_place(name):
    base, weights, bias = head(700, 90, 30, torch.bfloat16)
    function = OPS[name][0]
    on_device = [tensor.cuda() for tensor in (base, weights, bias)]
    for offset in range(0, 9):

        def view(x, w, b, offset=offset):
            return x[offset:, offset : offset + 37], w[:, offset + 3 : offset + 40], b

        expected = function(*[tensor.contiguous() for tensor in view(*on_device)])
        results = function(*view(*on_device))
        for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (results, expected)), strict=True):
            assert torch.equal(a, b)


def test_a_few_million_rows():
    """More than 2^31 elements; every row against PyTorch, in pieces."""
    N, D, K = 4_300_000, 512, 100
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    x = torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
    for part in x.split(100_000):
        part.normal_()
    w, b = randn(K, D).mul(0.01).bfloat16(), randn(K, seed=1).bfloat16()
    energy = oodkern.linear_energy(x, w, b)
    index = oodkern.nearest_center(x, w).index
    for begin in range(0, N, 100_000):
        rows = slice(begin, begin + 100_000)
        exact = reference.linear_energy(x[rows].double(), w.double(), b.double())
        assert ((energy[rows] - exact).abs() <= 3e-5 * exact.abs() + 3e-6).all(), begin
        assert ((index[rows] >= 0) & (index[rows] < K)).all()
    scores = oodkern.linear_scores(x[-5:], w, b)
    assert torch.equal(scores.energy, energy[-5:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_begin_at_these_values(dtype):
    """Twice, by Triton's kernels."""
    if backends.missing("triton", "cuda"):
        pytest.skip(backends.missing("triton", "cuda"))
    x, w, b = (tensor.cuda().requires_grad_() for tensor in head(300, 64, 20, dtype))
    value = oodkern.linear_energy(x, w, b)
    g = like(value.cpu()).cuda()
    gradients = torch.autograd.grad(value, (x, w, b), g, create_graph=True)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    exact = torch.autograd.grad(reference.linear_energy(*leaves), leaves, g.double(), create_graph=True)
    for ours, oracle in zip(gradients, exact, strict=True):
        assert (ours.double() - oracle).abs().max() <= 2e-2 * oracle.abs().max()
    second = torch.autograd.grad(gradients[0].float().square().sum(), x)[0]
    oracle = torch.autograd.grad(exact[0].square().sum(), leaves[0])[0]
    assert (second.double() - oracle).abs().max() <= 5e-2 * oracle.abs().max()
    for function in (oodkern.alignment, lambda x, w: oodkern.subspace_energy(x, w.T).outside):
        torch.autograd.grad(function(x, w).sum(), (x, w))


def test_taken_without_a_demand(monkeypatch):
    x, w, _ = (tensor.cuda() for tensor in head(300, 64, 20, torch.bfloat16))
    expected = oodkern.linear_energy(x, w)
    if not backends.missing("triton", "cuda"):
        monkeypatch.setattr(backends, "_demanded", None)
        assert torch.equal(oodkern.linear_energy(x, w), expected)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(oodkern.linear_energy, fullgraph=True)(x, w), expected)


def test_compile():
    torch._dynamo.reset()
    x, w, _ = (tensor.cuda() for tensor in head(300, 64, 20, torch.bfloat16))
    compiled = torch.compile(oodkern.linear_energy, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), oodkern.linear_energy(x, w), rtol=0, atol=0)


def test_other_devices_are_refused():
    x, w, _ = head(4, 8, 3, torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight: expected the device of features"):
        torch.ops.oodkern.alignment(x.cuda(), w)
