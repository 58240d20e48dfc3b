from __future__ import annotations

import pytest
import torch
from judge import DEVICE, DTYPES, OPS, in_small_waves, randn

from oodkern import reference
from oodkern.triton_kernels import select

SHAPES = [(37, 45, 50), (1, 7, 1), (16, 32, 32), (50, 3, 90), (6, 0, 4), (0, 8, 5)]


@pytest.fixture(params=[False, True], ids=["splits", "one split"])
def splits(request, monkeypatch):
    if request.param:
        in_small_waves(monkeypatch, select)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest_center(shape, dtype, splits):
    N, D, K = shape
    features, centers = randn(N, D, dtype=dtype), randn(K, D, dtype=dtype, seed=1)
    index, distance = OPS.nearest_center(features, centers)
    expected, exact = reference.nearest_center(features.double(), centers.double())
    assert index.dtype == torch.int64
    assert distance.dtype == torch.float32
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6, atol=0)


def test_lowest_index_of_equal_centers(splits):
    centers = randn(90, 24, seed=1)
    for one in (3, 64):  # products of integers are the same whatever order they are added in
        centers[one] = centers[one].mul(3).round()
    centers[40:45], centers[70] = centers[3], centers[64]
    features = randn(30, 24)
    features[:20], features[20:] = centers[3], centers[64]
    index, distance = OPS.nearest_center(features, centers)
    assert index.tolist() == [3] * 20 + [64] * 10
    # Formed as sum (x - c)^2: of equal vectors exactly 0.
    assert not distance.any()


def test_distance_does_not_cancel():
    centers = randn(20, 24, seed=1) + 1000
    features = centers[[4, 9, 19]] + randn(3, 24, scale=1e-2)
    index, distance = OPS.nearest_center(features, centers)
    assert index.tolist() == [4, 9, 19]
    exact = (features.double() - centers[index].double()).square().sum(-1)
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6, atol=0)


def test_nan_stays_in_its_row(splits):
    features, centers = randn(40, 24), randn(50, 24, seed=1)
    expected = OPS.nearest_center(features, centers)
    features[7, 3] = torch.nan
    index, distance = OPS.nearest_center(features, centers)
    assert 0 <= int(index[7]) < 50
    assert distance.isnan().nonzero().flatten().tolist() == [7]
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(index[others], expected[0][others])


def test_strided_inputs():
    features, centers = randn(74, 64)[::2, 3:48], randn(45, 50, seed=1).T
    for result, same in zip(
        OPS.nearest_center(features, centers),
        OPS.nearest_center(features.contiguous(), centers.contiguous()),
        strict=True,
    ):
        assert torch.equal(result, same)
