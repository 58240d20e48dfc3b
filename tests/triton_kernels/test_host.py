from __future__ import annotations

import pytest
import torch
from judge import DEVICE, randn

from oodkern.triton_kernels import _host, configs
from oodkern.triton_kernels.configs import TABLE, architecture, config, shape_class


def test_architecture():
    expected = {"sm_80": "sm_80", "sm_86": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100"}
    expected |= {"sm_103": "sm_100", "sm_120": "sm_80", "cpu": "interpreter"}
    assert {arch: architecture(arch) for arch in expected} == expected
    assert (shape_class(64), shape_class(65)) == ("few", "many")


def test_config_is_a_lookup():
    assert config("linear_energy", torch.bfloat16, 1000, "sm_90") == configs.WIDEST
    assert config("linear_energy", torch.float16, 1000, "sm_90", descriptors=False) == configs.AMPERE
    assert config("linear_energy", torch.float16, 64, "sm_86") == configs.AMPERE_FEW
    assert config("linear_energy", torch.float32, 64, "cpu") == configs.INTERPRETED
    assert not config("linear_energy", torch.float32, 64, "cpu", descriptors=False).descriptors
    with pytest.raises(KeyError):
        config("linear_enery", torch.float32, 64, "cpu")


def test_table_is_complete():
    """Every row has a tile for every architecture, and one without descriptors for operands that are not aligned."""
    for row in TABLE.values():
        assert list(row) == ["sm_80", "sm_90", "sm_100", "interpreter"]
        assert not row["sm_80"].descriptors


def test_splits_are_whole_tiles_and_never_empty():
    for row_tiles in (0, 1, 7, 131, 132, 263, 264, 10_000):
        for K in (0, 1, 63, 64, 65, 1000, 21_841):
            splits, share = _host.split_columns(row_tiles, K, 64)
            assert share % 64 == 0
            assert (splits - 1) * share < max(K, 1) <= splits * share
            assert splits == 1 or row_tiles * splits <= 264


def test_waves_cover_the_rows_and_are_bounded():
    for N in (0, 1, 127, 128, 129, 100_000):
        for row_bytes in (0, 1, 2000, 40_000, 1 << 22):
            for rows in (0, 2112, 1 << 22):
                waves = list(_host.waves(N, row_bytes, rows))
                assert [begin for begin, _ in waves] == [0, *(end for _, end in waves)][: len(waves)]
                assert (waves[-1][1] if waves else 0) == N
                for begin, end in waves:
                    assert begin % 128 == 0
                    assert end > begin
                    assert (end - begin) * row_bytes <= max(_host.WORKSPACE, 128 * row_bytes)


def test_what_can_be_described():
    wide = torch.zeros(20, 72, dtype=torch.float16)
    assert _host.describable(wide)
    assert _host.describable(wide[3:, 8:50])
    for matrix in (
        wide[:, 1:],
        wide[:, ::2],
        wide[:, :0],
        wide[:0],
        wide[:1].expand(20, 72),
        wide[:, :70].contiguous(),
    ):
        assert not _host.describable(matrix)


def test_rows_dense():
    wide = torch.zeros(20, 72)
    for kept in (wide, wide[::2, 3:], wide[:1].expand(9, 72), wide[:, :1]):
        assert _host.rows_dense(kept) is kept
    for copied in (wide.T, wide[:, ::2], wide[:, :1].expand(20, 72)):
        assert _host.rows_dense(copied).stride() == (copied.shape[1], 1)


def test_power_of_two():
    for top in (1e-7, 3.0, 1.0, 0.5, 7e4, 1e-30):
        power = _host.power_of_two(torch.tensor([0.0, top, torch.nan, torch.inf, top / 7]))
        assert torch.frexp(power)[0] == 0.5
        assert 2**14 <= top * power < 2**15
    for nothing in (torch.zeros(3), torch.zeros(0), torch.tensor([torch.nan]), torch.tensor([1e-42])):
        assert _host.power_of_two(nothing).isfinite()
        assert (1.0 / _host.power_of_two(nothing)).isfinite()


def test_products():
    for dtype in (torch.float32, torch.float16):
        a, b = randn(37, 20, dtype=dtype), randn(37, 50, dtype=dtype, seed=1)
        exact = a.double().T @ b.double()
        result = _host.product(a.T, b)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
        out = torch.empty(50, 50, dtype=dtype, device=DEVICE)[:20]
        assert _host.product(a.T, b, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, result.to(dtype))
        total, factor = torch.ones(20, 50, device=DEVICE), torch.tensor(0.25, device=DEVICE)
        _host.add_product(total, a.T, b)
        torch.testing.assert_close(total.double(), 1 + exact, rtol=1e-5, atol=1e-5)
        _host.add_product(total, a.T, b, factor)
        torch.testing.assert_close(total.double(), 1 + 1.25 * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(37, 20, 50), (1, 1, 1), (16, 32, 16), (40, 0, 33)], ids=str)
def test_full_product(shape):
    M, inner, N = shape
    a, b = randn(M, inner), randn(N, inner, seed=1).T
    exact = a.double() @ b.double()
    for left, right in ((a, b), (a.T.contiguous().T, b), (a, b.contiguous())):
        torch.testing.assert_close(_host.full_product(left, right).double(), exact, rtol=1e-6, atol=1e-5)


def test_tf32_is_seen_however_it_was_asked_for():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not _host.exact_float32()
        torch.set_float32_matmul_precision("highest")
        assert _host.exact_float32()
        torch.backends.cuda.matmul.allow_tf32 = True
        assert not _host.exact_float32()
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not _host.exact_float32()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
    assert _host.exact_float32()


@pytest.mark.gpu
def test_float32_products_are_not_tf32():
    a, b = randn(256, 512), randn(512, 256, seed=1)
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert (_host.product(a, b).double() - exact).abs().max() < 1e-4
            total = torch.zeros(256, 256, device=DEVICE)
            _host.add_product(total, a, b)
            assert (total.double() - exact).abs().max() < 1e-4
    finally:
        torch.set_float32_matmul_precision(before)
