"""A float32 head, or float32 centers, beside 16-bit features; and rows that count by their direction."""

import pytest
import torch
from layouts import FLOATS
from oracle import memory_events

import oodkern
from oodkern import _native, reference

HALVES = (torch.float16, torch.bfloat16)
SIZES = [(5, 3, 4), (0, 3, 4), (1, 1, 1), (300, 65, 1100), (700, 40, 2100), (4, 0, 3), (33, 1100, 17)]
BACKENDS = ["native", "reference"]


def head(sizes, dtype):
    N, D, K = sizes
    return torch.randn(N, D).to(dtype), torch.randn(K, D) * 0.3, torch.randn(K)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES)
def test_scores_of_a_float32_head(dtype, sizes):
    """Nothing of the head is rounded: the error is that of float32, where rounding it would be seen a hundredfold."""
    x, w, b = head(sizes, dtype)
    exact = reference.linear_scores(x.double(), w.double(), b.double())
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            scores = oodkern.linear_scores(x, w, b)
        for field, ours, oracle in zip(scores._fields, scores, exact, strict=True):
            if field != "argmax":
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=2e-5, msg=field)
        z = reference.linear(x.double(), w.double(), b.double())
        picked = z.gather(1, scores.argmax[:, None]).squeeze(1)
        torch.testing.assert_close(picked, exact[2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_mixed_is_as_if_features_were_widened(dtype, backend):
    """Of 16-bit weights with a float32 bias, too; the widened features' products are the same ones, bit for bit."""
    x, w, b = head((70, 33, 12), dtype)
    with oodkern.backend(backend):
        for weight, bias in ((w, b), (w, None), (w, b.to(dtype))):
            wide = None if bias is None else bias.float()
            for ours, widened in zip(
                oodkern.linear_scores(x, weight, bias), oodkern.linear_scores(x.float(), weight, wide), strict=True
            ):
                assert torch.equal(ours, widened)
        halves = oodkern.linear_scores(x, w.to(dtype), b)
        exact = reference.linear_scores(x.double(), w.to(dtype).double(), b.double())
        torch.testing.assert_close(halves.energy.double(), exact[0], rtol=1e-5, atol=1e-5)
        for normalize in (False, True):
            for ours, widened in zip(
                oodkern.nearest_center(x, w, normalize), oodkern.nearest_center(x.float(), w, normalize), strict=True
            ):
                assert torch.equal(ours, widened)


@pytest.mark.parametrize("dtype", HALVES)
def test_any_strides(dtype):
    base, w = torch.randn(40, 24).to(dtype), torch.randn(24, 18)
    for x, c in ((base[::2, ::3], w.T[:, :8]), (base[:1, :8].expand(9, 8), w[:, 1:9])):
        dense = x.contiguous(), c.contiguous()
        for ours, expected in (
            (oodkern.linear_scores(x, c), oodkern.linear_scores(*dense)),
            (oodkern.nearest_center(x, c, True), oodkern.nearest_center(*dense, True)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "centers_dtype"), [(dtype, dtype) for dtype in FLOATS] + [(dtype, torch.float32) for dtype in HALVES]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_nearest_against_float64(dtype, sizes, centers_dtype, normalize):
    N, D, K = sizes
    x, c = torch.randn(N, D).to(dtype) * 3, torch.randn(K, D)
    c = (reference.unit(c) if normalize else c).to(centers_dtype)
    rows = reference.unit(x.double()) if normalize else x.double()
    _, exact = reference.nearest_center(rows, c.double())
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            index, distance = oodkern.nearest_center(x, c, normalize=normalize)
        assert index.dtype == torch.int64
        assert distance.dtype == torch.promote_types(dtype, torch.float32)
        own = (rows - c.double()[index]).square().sum(1)
        torch.testing.assert_close(distance.double(), own, rtol=1e-6, atol=0)
        slack = 1e-5 if dtype != torch.float64 else 1e-13
        assert (own <= exact + slack * (rows.norm(dim=1) + 1) * (c.double().norm(dim=1).max() + 1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_directions(backend):
    """A row's length does not count, one of zeros stays where it is, and the first of equals is taken."""
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.1, 0.1], [3.0, 4.0]])
    x = torch.tensor([[100.0, 0.0], [0.0, 1e-3], [0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [600.0, 800.0]])
    with oodkern.backend(backend):
        for rows in (x, x.half()):
            index, distance = oodkern.nearest_center(rows, c, normalize=True)
            assert index.tolist() == [0, 1, 3, 0, 0, 1]
            torch.testing.assert_close(
                distance, torch.tensor([0, 0, 0.02, torch.nan, torch.nan, 0.4]), rtol=1e-5, atol=1e-12, equal_nan=True
            )


def test_directions_do_not_cancel():
    """Of rows 1e-4 from their center the distance keeps all digits that float32 has."""
    c = reference.unit(torch.randn(3, 50))
    x = (c[torch.arange(60) % 3] + 1e-5 * torch.randn(60, 50)) * 37
    _, distance = oodkern.nearest_center(x, c, normalize=True)
    exact = (reference.unit(x.double()) - c.double()[torch.arange(60) % 3]).square().sum(1)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", [oodkern.linear_scores, lambda x, c: oodkern.nearest_center(x, c, True)])
@pytest.mark.parametrize("dtype", HALVES)
def test_features_are_not_copied(function, dtype):
    held = []
    for N in (6000, 48_000):
        x, w = torch.randn(N, 128).to(dtype), torch.randn(1500, 128)
        peak = total = 0
        for change in memory_events(lambda x=x, w=w: function(x, w)):
            total += change
            peak = max(peak, total)
        held.append(peak - N * (24 if function is oodkern.linear_scores else 12))
    assert max(held) <= 16 << 20
    assert held[1] <= held[0] + (64 << 10)


@pytest.mark.parametrize("dtype", HALVES)
def test_repeats_bit_for_bit_and_opcheck(dtype):
    x, w, b = head((2000, 64, 130), dtype)
    for a, again in zip(oodkern.linear_scores(x, w, b), oodkern.linear_scores(x, w, b), strict=True):
        assert torch.equal(a, again)
    x, w, b = head((9, 4, 5), dtype)
    torch.library.opcheck(torch.ops.oodkern.linear_scores.default, (x, w, b))
    for normalize in (False, True):
        torch.library.opcheck(torch.ops.oodkern.nearest_center.default, (x, w, normalize))


def test_other_combinations_are_rejected():
    x, w, b = head((4, 3, 5), torch.float16)
    either = "expected float16 as features are, or float32, got"
    for function, name in ((oodkern.linear_scores, "weight"), (oodkern.nearest_center, "centers")):
        for other in (torch.float64, torch.bfloat16):
            with pytest.raises(TypeError, match=f"{name}: {either} {str(other)[6:]}"):
                function(x, w.to(other))
        with pytest.raises(TypeError, match=f"{name}: expected float32 as features are, got float16"):
            function(x.float(), w.half())
    with pytest.raises(TypeError, match=f"bias: {either} float64"):
        oodkern.linear_scores(x, w, b.double())
    with pytest.raises(TypeError, match="normalize: expected True or False, got int"):
        oodkern.nearest_center(x, w, 1)
    # What has gradients takes one dtype.
    with pytest.raises(TypeError, match="weight: expected float16 as features are, got float32"):
        oodkern.linear_energy(x, w, b)
    raw = torch.ops.oodkern
    for function in (lambda w, b: raw.linear_scores(x, w, b), lambda w, b: raw.nearest_center(x, w)):
        with pytest.raises(RuntimeError, match="float32 beside 16 bits"):
            function(w.double(), None)
    with pytest.raises(RuntimeError, match="bias: expected"):
        raw.linear_scores(x, w, b.double())
    with pytest.raises(RuntimeError, match="weight: expected"):
        raw.linear_score("energy", x, w, b, 1.0)


def test_compiles():
    x, w, b = head((9, 4, 5), torch.bfloat16)
    compiled = torch.compile(lambda: (*oodkern.linear_scores(x, w, b), *oodkern.nearest_center(x, w, True)))
    expected = (*oodkern.linear_scores(x, w, b), *oodkern.nearest_center(x, w, True))
    for ours, eager in zip(compiled(), expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
