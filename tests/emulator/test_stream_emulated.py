"""The stream engine without a GPU: rooms around a product of 16-bit features with few classes."""

from __future__ import annotations

import pytest
import torch
from emulate import ORDERS
from oracle import like
from stream_cases import DTYPES, LONG_SIZES, OPS, SIZES, head, judge

import oodkern
from oodkern import reference

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def results_of(name, inputs):
    results = OPS[name][0](*inputs)
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


@pytest.mark.parametrize("name", OPS)
def test_against_float64(dtype, name):
    for sizes in SIZES:
        judge(name, head(*sizes, dtype))


@pytest.mark.parametrize("name", [name for name in OPS if "subspace" not in name])
@pytest.mark.parametrize("sizes", LONG_SIZES)
def test_classes_in_shared_memory_or_by_groups(emulated, dtype, name, sizes):
    """Both ways give the same bits: sums are added in the same order."""
    inputs = head(*sizes, dtype)
    judge(name, inputs)
    resident = results_of(name, inputs)
    emulated.shared_bytes = {10: 18 << 10, 60: 36 << 10, 100: 48 << 10, 192: 100 << 10}[sizes[2]]
    emulated.order, emulated.seed = ORDERS["shuffled"], 3
    for a, b in zip(results_of(name, inputs), resident, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", LONG_SIZES)
def test_bases_by_groups(emulated, dtype, sizes):
    emulated.order, emulated.seed, emulated.multiprocessors = ORDERS["shuffled"], 3, 1
    judge("subspace_energy", head(*sizes, dtype))


def test_every_order_gives_the_same_bits(emulated, dtype):
    for name in OPS:
        inputs = head(40, 70, 20, dtype)
        expected = results_of(name, inputs)
        for emulated.order, emulated.multiprocessors in ((ORDERS["descending"], 1), (ORDERS["shuffled"], 132)):
            for a, b in zip(results_of(name, inputs), expected, strict=True):
                assert torch.equal(a, b)
        emulated.set()


def test_blocks_walk_over_tiles(emulated):
    """Slabs of the next tile are read before a tile is finished, classes of a group likewise."""
    for sizes, shared in (((1100, 8, 3), 227 << 10), ((520, 300, 110), 100 << 10)):
        emulated.multiprocessors, emulated.shared_bytes = 2, shared
        judge("linear_energy", head(*sizes, torch.bfloat16))


@pytest.mark.parametrize("name", OPS)
def test_any_layout(emulated, name):
    """Rows and classes at any address and stride; results at any address."""
    dtype = torch.bfloat16
    base, weights, bias = head(40, 90, 30, dtype)
    for offset in range(0, 9):
        emulated.offset = offset % 4 * 4 if name != "linear_scores" and name != "nearest_center" else offset % 2 * 8
        x, w = base[offset:, offset : offset + 37], weights[:, offset + 3 : offset + 40]
        judge(name, (x, w, bias))
    for x, w in (
        (base[::3, ::2], weights.T[:45, :].T),
        (base[:1].expand(50, 90), weights),
        (base.T[:, :30], base[:5, :30]),
    ):
        judge(name, (x, w, bias[: len(w)]))
    judge(name, (base, weights[::2], bias[::2]))


@pytest.mark.parametrize("name", OPS)
def test_nothing(dtype, name):
    x, w, b = head(4, 8, 3, dtype)
    for result in results_of(name, (x[:0], w, b)):
        assert result.shape == (0,)


def test_nan_and_infinities_stay_in_their_rows(dtype):
    x, w, b = head(40, 40, 20, dtype)
    clean = {name: results_of(name, (x, w, b)) for name in OPS}
    x = x.clone()
    x[3, 39], x[17, 0], x[33, 5] = torch.nan, torch.inf, -torch.inf
    others = torch.tensor([i for i in range(40) if i not in (3, 17, 33)])
    for name, before in clean.items():
        dirty = results_of(name, (x, w, b))
        for a, c in zip(dirty, before, strict=True):
            assert torch.equal(a[others], c[others])
            if a.dtype == torch.float32:
                assert a[3].isnan()
        oracle = OPS[name][1](x.double(), w.double(), b.double())
        oracle = (oracle,) if isinstance(oracle, torch.Tensor) else oracle
        for a, exact in zip(dirty, oracle, strict=True):
            if "subspace" in name:
                assert not a[[17, 33]].isfinite().any()  # parts of infinities are infinities of either sign
            elif a.dtype == torch.float32 and name != "alignment":
                torch.testing.assert_close(a[[17, 33]].double(), exact[[17, 33]], rtol=0, atol=0, equal_nan=True)


def test_what_lies_behind_a_row_is_not_read(dtype):
    """NaN between rows, behind classes, and in classes that are not there."""
    x, w, b = head(9, 70, 11, dtype)
    wide_x, wide_w = torch.full((9, 72), torch.nan, dtype=dtype), torch.full((16, 75), torch.nan, dtype=dtype)
    wide_x[:, :70], wide_w[:11, :70] = x, w
    for name in OPS:
        for a, expected in zip(
            results_of(name, (wide_x[:, :70], wide_w[:11, :70], b)), results_of(name, (x, w, b)), strict=True
        ):
            torch.testing.assert_close(a, expected, rtol=1e-6, atol=1e-6)


def test_infinite_biases(dtype):
    x, w, _ = head(3, 40, 20, dtype)
    b = torch.full((20,), -torch.inf, dtype=dtype)
    assert (oodkern.linear_energy(x, w, b) == torch.inf).all()
    assert (oodkern.linear_joint_energy(x, w, b) == 0).all()
    assert oodkern.linear_scores(x, w, b).argmax.tolist() == [0, 0, 0]
    b[7] = 0.5
    torch.testing.assert_close(oodkern.linear_energy(x, w, b), -reference.linear(x, w, b)[:, 7], rtol=1e-5, atol=1e-5)
    b[2] = torch.inf
    scores = oodkern.linear_scores(x, w, b)
    assert (scores.energy == -torch.inf).all()
    assert (scores.joint_energy == torch.inf).all()
    assert scores.argmax.tolist() == [2, 2, 2]
    b[[3, 11]] = torch.nan
    scores = oodkern.linear_scores(x, w, b)
    assert scores.argmax.tolist() == [3, 3, 3], "the first NaN"
    for score in (scores.energy, scores.joint_energy, scores.max_logit, scores.msp):
        assert score.isnan().all()


def test_the_first_of_equals(dtype):
    x, w = torch.ones(3, 4, dtype=dtype), torch.ones(30, 4, dtype=dtype)
    w[:7] = -1
    assert oodkern.linear_scores(x, w).argmax.tolist() == [7, 7, 7]
    index, distance = oodkern.nearest_center(x, w)
    assert index.tolist() == [7, 7, 7]
    assert (distance == 0).all()


def test_distances_do_not_cancel():
    x = (torch.randn(20, 8) * 0.25 + 100).bfloat16()
    distance = oodkern.nearest_center(x, x[:1]).squared_distance
    torch.testing.assert_close(distance, (x.float() - x[:1].float()).square().sum(1), rtol=1e-6, atol=0)


def test_what_is_left_outside_keeps_its_digits(dtype):
    """A thousandth of the norm lies outside: 16 bits of y = U^T x would be off by more."""
    generator = torch.Generator().manual_seed(3)
    inner = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q.float()
    u = torch.zeros(40, 8)
    u[:8] = inner
    x = torch.randn(50, 40, generator=generator)
    x[:, 8:] *= 5e-4
    x = x.to(dtype)
    inside, outside = oodkern.subspace_energy(x, u)
    exact = reference.subspace_energy(x.double(), u.double())
    torch.testing.assert_close(inside.double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(outside.double(), exact[1], rtol=2e-4, atol=0)


def test_rows_and_classes_of_zeros(dtype):
    x, w, _ = head(4, 40, 5, dtype)
    x[1], w[2] = 0, 0
    value = oodkern.alignment(x, w)
    assert value[1] == 0
    judge("alignment", (x[[0, 2, 3]], w, w[:, 0]))


def test_derivatives_begin_at_these_values(dtype):
    """Backward passes are others' kernels, which take the values from here."""
    x, w, b = (tensor.requires_grad_() for tensor in head(30, 40, 20, dtype))
    value = oodkern.linear_energy(x, w, b)
    gradients = torch.autograd.grad(value, (x, w, b), like(value))
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, w, b)]
    exact = torch.autograd.grad(reference.linear_energy(*leaves), leaves, like(value).double())
    for ours, oracle in zip(gradients, exact, strict=True):
        assert (ours.double() - oracle).abs().max() <= 2e-2 * oracle.abs().max()


def test_what_the_kernels_do_not_take(emulated):
    x, w, _ = head(4, 8, 3, torch.bfloat16)
    for features, weight, what in (
        (x.float(), w.float(), "the CUDA kernels take bfloat16 and float16"),
        (x, w[:0], "the CUDA kernels take 1 to 192 rows"),
        (x, w[:1].expand(193, 8), "the CUDA kernels take 1 to 192 rows"),
        (x[:, :0], w[:, :0], "the CUDA kernels take 1 to 1,048,576 columns"),
    ):
        with pytest.raises(RuntimeError, match=what):
            emulated.call("alignment", features, weight)
