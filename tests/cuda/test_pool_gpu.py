"""Scores of pools on a real device: chunks that are copied by a stream of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oodkern
from oodkern import reference
from oodkern.pools.scoring import score_pool
from oodkern.pools.store import FeatureStore
from oodkern.pools.streaming import staged_chunks

pytestmark = pytest.mark.gpu
NAMES = ("energy", "joint_energy", "max_logit", "msp")


@pytest.fixture(autouse=True)
def native():
    """In place of what demands native kernels of every test here: a pool may be of any dtype, and is anybody's."""


def head_of(K, D):
    return torch.randn(K, D).mul(0.1), torch.randn(K)


@pytest.mark.parametrize("rows", [1000, 4096, 100_000])
def test_chunks_arrive_as_they_are(rows):
    """Also where the consumer is slow, and where it is on another stream than at first."""
    features = torch.randn(20_500, 96).bfloat16()
    store, device = FeatureStore.of(features), torch.device("cuda")
    seen, other = [], torch.cuda.Stream()
    for number, (offset, chunk) in enumerate(staged_chunks(store, rows, device)):
        assert chunk.is_cuda
        stream = other if number % 3 == 2 else torch.cuda.current_stream()
        if stream is other:
            other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # the copy of the chunk after next is queued long before this is read
            seen.append((offset, chunk.clone()))
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert [offset for offset, _ in seen] == list(range(0, 20_500, rows))
    assert torch.equal(torch.cat([chunk for _, chunk in seen]).cpu(), features)


def test_a_consumer_that_stops():
    store = FeatureStore.of(torch.randn(50_000, 64).half())
    for _ in range(20):
        for _, chunk in staged_chunks(store, 1000, torch.device("cuda")):
            chunk.sum()
            break
        torch.full((1000, 64), 3.0, device="cuda").half()
    torch.cuda.synchronize()


@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_against_float64(dtype, head_dtype):
    features = torch.randn(5000, 64).to(dtype)
    weight, bias = (one.to(head_dtype) for one in head_of(50, 64))
    exact = reference.linear_scores(features.double(), weight.double(), bias.double())
    exact = dict(zip(oodkern.ops.linear_energy.LinearScores._fields, exact, strict=True))
    for names in (NAMES, ("energy",), ("joint_energy",)):
        found = score_pool(features, (weight.cuda(), bias.cuda()), names, chunk_rows=777)
        for name in names:
            torch.testing.assert_close(torch.from_numpy(found[name]).double(), exact[name], rtol=3e-5, atol=3e-5)
    hot = score_pool(features, (weight, bias), ("energy", "msp"), temperature=2.0, chunk_rows=777, device="cuda")
    exact_hot = reference.linear_energy(features.double(), weight.double(), bias.double(), 2.0)
    torch.testing.assert_close(torch.from_numpy(hot["energy"]).double(), exact_hot, rtol=3e-5, atol=3e-5)


def test_two_chunks_are_held(tmp_path):
    N, D, rows = 400_000, 128, 16_384
    np.save(tmp_path / "pool.npy", torch.randn(N, D).half().numpy())
    store, head = FeatureStore.open(tmp_path / "pool.npy"), [one.half().cuda() for one in head_of(100, D)]
    score_pool(store, tuple(head), chunk_rows=rows)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    score_pool(store, tuple(head), chunk_rows=rows)
    assert torch.cuda.max_memory_allocated() - held < 2.5 * rows * D * 2 + 16e6
