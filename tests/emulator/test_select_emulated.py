"""`cluster_extremes` and `TopK` on CUDA, without a GPU: their kernels in the emulator."""

from __future__ import annotations

import pytest
import torch
from emulate import ORDERS
from layouts import FLOATS
from select_cases import KINDS, check_extremes, check_stream, scores_of

import oodkern


@pytest.fixture(autouse=True)
def kernels(emulated):
    with oodkern.backend("native"):
        yield emulated


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
class TestTopK:
    def test_chunks_forwards_and_backwards(self, dtype, kind):
        """Appended, cut for want of room, cut for a first bar; k = 1, k beyond a block, k beyond the stream."""
        scores = scores_of(900, dtype, kind)
        for k in (1, 100, 300, 2000):
            check_stream(k, scores, (50, 120, 121, 400), offset=2**40)
            check_stream(k, scores, (300, 350, 600), largest=False, backwards=True)


def test_every_order_gives_the_same(kernels):
    scores = scores_of(3000, torch.float32, "special")
    for kernels.order in ORDERS.values():
        kernels.seed += 1
        for kernels.multiprocessors in (1, 3):
            check_stream(200, scores, (1000, 1030, 1900))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_alignment_and_stride(dtype):
    scores = scores_of(640, dtype, "ties")
    for begin in range(0, 16 // scores.element_size()):
        for length in (1, 13, 500):
            check_stream(7, scores[begin : begin + length])
    check_stream(60, scores[::3])
    check_stream(60, scores[:1].expand(400))


def test_blocks_walk_over_scores(kernels):
    """More than the emulator's 24 blocks take at once."""
    kernels.multiprocessors = 132
    check_stream(100, scores_of(60_000, torch.float16, "distinct"))


def test_an_update_that_is_taken_in_by_parts(kernels):
    """More scores than the room for one multiprocessor, the best among the last."""
    kernels.multiprocessors = 1
    for dtype in (torch.float32, torch.float64):
        check_stream(100, torch.arange(70_000).to(dtype).roll(-3000), offset=2**33)


def test_rising_scores_pass_and_falling_ones_do_not():
    rising = torch.arange(-2000.0, 2000.0)
    check_stream(50, rising, range(0, 4000, 500))
    check_stream(50, -rising, range(0, 4000, 500))


def test_a_stream_goes_on_from_its_state():
    scores = scores_of(500, torch.float32, "special")
    top = check_stream(40, scores[:200])
    again = oodkern.TopK(40)
    again.load_state_dict(top.state_dict())
    again.update(scores[200:], 200)
    expected = check_stream(40, scores).result()
    for ours, theirs in zip(again.result(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert again.nans == int(scores.isnan().sum())


def test_a_sample_that_is_given_twice_does_no_harm():
    scores = scores_of(100, torch.float32, "distinct")
    top = oodkern.TopK(5)
    for _ in range(40):
        top.update(scores, 0)
    best = scores.max()
    assert (top.result().values == best).all()
    assert (top.result().indices == scores.argmax()).all()


def test_no_scores(kernels):
    top = oodkern.TopK(3)
    top.update(torch.empty(0), 0)
    assert top.result().values.shape == (0,)
    top.update(torch.full((9,), torch.nan), 0)
    assert (top.result().values.shape, top.nans, top.seen) == ((0,), 9, 9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kernels, dtype, kind):
    """Tables of a block, tables of all, a sort, words too small for a score and an index; more than members."""
    score = scores_of(700, dtype, kind)
    generator = torch.Generator().manual_seed(1)
    for clusters, per_side in ((1, 1), (7, 3), (300, 4), (2049, 2), (5, 33), (2, 800)):
        cluster = torch.randint(0, max(1, clusters - 1), (700,), generator=generator)
        found = oodkern.cluster_extremes(score, cluster, clusters, per_side)
        check_extremes(found, score, cluster, clusters, per_side)


def test_extremes_in_every_order(kernels):
    for dtype in (torch.float32, torch.float64):
        score, cluster = scores_of(3000, dtype, "ties"), torch.arange(3000) % 11
        for kernels.order in ORDERS.values():
            kernels.seed += 1
            for kernels.multiprocessors in (1, 132):
                check_extremes(oodkern.cluster_extremes(score, cluster, 11, 2), score, cluster, 11, 2)


def test_extremes_of_many_scores(kernels):
    """Blocks walk over scores, and over the words of clusters."""
    score, cluster = scores_of(40_000, torch.float32, "ties"), torch.arange(40_000) % 9
    kernels.multiprocessors = 132
    check_extremes(oodkern.cluster_extremes(score, cluster, 9), score, cluster, 9, 1)
    check_extremes(oodkern.cluster_extremes(score[:50], cluster[:50], 9000), score[:50], cluster[:50], 9000, 1)


def test_extremes_of_nothing():
    for clusters in (0, 3):
        for per_side in (2, 33):
            for side in oodkern.cluster_extremes(torch.empty(0), torch.empty(0).long(), clusters, per_side):
                assert side.tolist() == [[-1] * per_side] * clusters


def test_clusters_that_do_not_exist_are_passed_over(kernels):
    score = torch.tensor([5.0, 1.0, 9.0, -9.0])
    for dtype, per_side in ((torch.float32, 1), (torch.float32, 33), (torch.float64, 1)):
        cluster = torch.tensor([0, 1, 2, -1])
        low, high = kernels.raw("cluster_extremes", score.to(dtype), cluster, 2, per_side)
        assert low[:, 0].tolist() == high[:, 0].tolist() == [0, 1]
        assert (low[:, 1:] == -1).all()


def test_raw_ops_refuse(kernels):
    score, cluster = torch.randn(4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(RuntimeError, match="cluster: expected one int64 a score"):
        kernels.raw("cluster_extremes", score, cluster[:2], 3, 1)
    with pytest.raises(RuntimeError, match="values: expected 66 numbers"):
        kernels.raw("top_k_update", score, 0, 2, True, torch.zeros(5), torch.zeros(66).long(), torch.zeros(3).long())
