"""`cluster_extremes` and `TopK` on a real device: the cases of the emulator, and what only a device has."""

from __future__ import annotations

import pytest
import torch
from layouts import FLOATS
from select_cases import KINDS, check_extremes, check_stream, scores_of

import oodkern
from oodkern import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
class TestGpuTopK:
    def test_chunks_forwards_and_backwards(self, dtype, kind):
        scores = scores_of(900, dtype, kind).cuda()
        for k in (1, 100, 300, 2000):
            check_stream(k, scores, (50, 120, 121, 400), offset=2**40)
            check_stream(k, scores, (300, 350, 600), largest=False, backwards=True)

    def test_many(self, dtype, kind):
        """Every block has scores, and every digit counts."""
        scores = scores_of(1_000_000, dtype, kind).cuda()
        for k in (10, 5000, 300_000):
            check_stream(k, scores, range(65_536, 10**6, 65_536 * 5))
            check_stream(k, scores[3::2], largest=False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(dtype, kind):
    for N in (700, 300_001):
        score = scores_of(N, dtype, kind).cuda()
        for clusters, per_side in ((1, 1), (7, 3), (300, 4), (2049, 2), (50_000, 1), (3, 40), (300, 500)):
            cluster = torch.randint(0, max(1, clusters - 1), (N,), device="cuda")
            found = oodkern.cluster_extremes(score, cluster, clusters, per_side)
            check_extremes(found, score, cluster, clusters, per_side)
            again = oodkern.cluster_extremes(score, cluster, clusters, per_side)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_clusters_that_do_not_exist_are_passed_over():
    score, cluster = torch.tensor([5.0, 1.0, 9.0, -9.0]).cuda(), torch.tensor([0, 1, 2, -1]).cuda()
    for dtype in (torch.float32, torch.float64):
        for side in oodkern.cluster_extremes(score.to(dtype), cluster, 2):
            assert side.tolist() == [[0], [1]]


def test_cuda_graph():
    """A whole stream is captured, and replayed on others: nothing waits for the device."""
    scores, cluster = scores_of(200_000, torch.float32, "ties").cuda(), torch.arange(200_000).cuda() % 40
    oodkern.cluster_extremes(scores, cluster, 40, 2)
    oodkern.TopK(1000).update(scores, 0)
    top = oodkern.TopK(1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for offset in range(0, 200_000, 50_000):
            top.update(scores[offset : offset + 50_000], offset)
        found = oodkern.cluster_extremes(scores, cluster, 40, 2)
        more = oodkern.cluster_extremes(scores, cluster, 40, 100)
    for kind in ("special", "equal", "distinct"):
        scores.copy_(scores_of(200_000, torch.float32, kind, seed=3))
        graph.replay()
        check_extremes(found, scores, cluster, 40, 2)
        check_extremes(more, scores, cluster, 40, 100)
        kept = (~scores.isnan()).nonzero().squeeze(1)
        values, indices = reference.best(scores[kept], kept, 1000)
        assert torch.equal(top.result().values, values)
        assert torch.equal(top.result().indices, indices)
        assert top.nans == int(scores.isnan().sum())


def test_other_devices_are_refused():
    scores, cluster = torch.zeros(4, device="cuda"), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="cluster: expected the device of score"):
        torch.ops.oodkern.cluster_extremes(scores, cluster, 3, 1)
    held = [torch.zeros(66, device="cuda"), torch.zeros(66, device="cuda").long(), torch.zeros(3).long()]
    with pytest.raises(RuntimeError, match="state: expected the device of scores"):
        torch.ops.oodkern.top_k_update(scores, 0, 2, True, *held)


def test_offsets_of_64_bits():
    """More than 2^31 scores."""
    N = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 14 * N:
        pytest.skip("needs 30 GB of free memory")
    scores = torch.zeros(N, dtype=torch.float32, device="cuda")
    scores[-3], scores[-1] = 2.0, -2.0
    cluster = torch.zeros(N, dtype=torch.int64, device="cuda")
    found = oodkern.cluster_extremes(scores, cluster, 1)
    assert (found.lowest.tolist(), found.highest.tolist()) == ([[N - 1]], [[N - 3]])
    top = oodkern.TopK(2)
    top.update(scores, 5)
    assert top.result().indices.tolist() == [N + 2, 5]


def test_compile_and_opcheck():
    torch._dynamo.reset()
    score, cluster = torch.randn(50, device="cuda"), torch.randint(0, 5, (50,), device="cuda")
    compiled = torch.compile(oodkern.cluster_extremes, fullgraph=True)
    check_extremes(compiled(score, cluster, 5, 2), score, cluster, 5, 2)
    torch.library.opcheck(torch.ops.oodkern.cluster_extremes.default, (score, cluster, 5, 2))
    held = (torch.zeros(74, device="cuda"), torch.zeros(74).long().cuda(), torch.zeros(3).long().cuda())
    torch.library.opcheck(torch.ops.oodkern.top_k_update.default, (score, 7, 10, True, *held))
