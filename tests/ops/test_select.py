"""Room `select`: assignment to the nearest center."""

import pytest
import torch
from layouts import FLOATS
from oracle import memory_events

import oodkern
from oodkern import _native, reference


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(5, 3, 4), (0, 3, 4), (1, 1, 1), (300, 65, 1100), (700, 40, 2100), (4, 0, 3)])
def test_against_float64(dtype, sizes):
    N, D, K = sizes
    for name in _native.instruction_sets():
        x, c = torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype)
        with _native.instruction_set(name):
            index, distance = oodkern.nearest_center(x, c)
        assert index.dtype == torch.int64
        assert distance.dtype == torch.promote_types(dtype, torch.float32)
        _, exact = reference.nearest_center(x.double(), c.double())
        # The distance is that of the center that is named, to rounding; it is the nearest one, or as near as one.
        own = (x.double() - c.double()[index]).square().sum(1)
        torch.testing.assert_close(distance.double(), own, rtol=1e-6, atol=0)
        slack = 1e-5 if dtype != torch.float64 else 1e-13
        assert (own <= exact + slack * (x.double().norm(dim=1) + 1) * (c.double().norm(dim=1).max() + 1)).all()


def test_the_first_of_equals():
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [5.0, 5.0]])
    index, distance = oodkern.nearest_center(torch.tensor([[1.0, 0.0], [0.4, 0.4], [4.0, 6.0]]), c)
    assert index.tolist() == [0, 0, 3]
    assert distance[0] == 0
    many = torch.zeros(3000, 2)
    assert oodkern.nearest_center(torch.ones(2, 2), many).index.tolist() == [0, 0]


def test_distances_do_not_cancel():
    """Far from the origin |x|^2 - 2 x . c + |c|^2 loses what (x - c)^2 keeps."""
    x = torch.randn(50, 8) * 1e-3 + 100
    distance = oodkern.nearest_center(x, x[:1]).squared_distance
    torch.testing.assert_close(distance, (x - x[:1]).square().sum(1), rtol=1e-5, atol=0)


def test_any_strides():
    base, centers = torch.randn(40, 24), torch.randn(24, 18)
    for x, c in ((base[::2, ::3], centers.T[:, :8]), (base[:1, :8].expand(9, 8), centers[:, 1:9])):
        for ours, dense in zip(
            oodkern.nearest_center(x, c), oodkern.nearest_center(x.contiguous(), c.contiguous()), strict=True
        ):
            assert torch.equal(ours, dense)


def test_nan_stays_in_its_row():
    x, c = torch.randn(5, 4), torch.randn(3, 4)
    clean = oodkern.nearest_center(x, c)
    x[2, 1] = torch.nan
    index, distance = oodkern.nearest_center(x, c)
    assert distance.isnan().tolist() == [False, False, True, False, False]
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(index[others], clean.index[others])
    assert 0 <= index[2] < 3


def test_workspace_is_bounded():
    held = []
    for N in (3000, 48_000):
        x, c = torch.randn(N, 64), torch.randn(1500, 64)
        events = memory_events(lambda x=x, c=c: oodkern.nearest_center(x, c))
        peak = total = 0
        for change in events:
            total += change
            peak = max(peak, total)
        held.append(peak - N * 12)
    assert max(held) <= 16 << 20
    assert held[1] <= held[0] + (64 << 10)


def test_reference_backend_and_opcheck():
    x, c = torch.randn(9, 4), torch.randn(5, 4)
    with oodkern.backend("reference"):
        expected = oodkern.nearest_center(x, c)
    assert torch.equal(oodkern.nearest_center(x, c).index, expected.index)
    torch.library.opcheck(torch.ops.oodkern.nearest_center.default, (x, c))


def test_rejects_what_it_cannot_compute():
    x, c = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"centers: expected \[K, 3\] with K >= 1 as features are, got \[0, 3\]"):
        oodkern.nearest_center(x, c[:0])
    with pytest.raises(ValueError, match=r"centers: expected \[K, 3\]"):
        oodkern.nearest_center(x, c[:, :2])
    with pytest.raises(TypeError, match="centers: expected float32 as features are, got float64"):
        oodkern.nearest_center(x, c.double())
    with pytest.raises(TypeError, match="features: expected one of"):
        oodkern.nearest_center(x.long(), c)
