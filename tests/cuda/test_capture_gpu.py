"""Raw ops of every room on another stream than the default one, and captured in a CUDA graph.

What they give is tested elsewhere; here it has to be, bit for bit, what they give without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from gpu import randn
from torch import Tensor

import oodkern

pytestmark = pytest.mark.gpu
raw = torch.ops.oodkern


def energy(z: Tensor, g: Tensor) -> Sequence[Tensor]:
    value = raw.energy(z, 1.0)
    return value, raw.energy_backward(g, z, value, 1.0), *raw.energy_double_backward(z, g, z, value, 1.0)


def norm(x: Tensor, g: Tensor, t: Tensor) -> Sequence[Tensor]:
    value = raw.sample_norm(x)
    return value, raw.sample_norm_backward(g, x, value), *raw.sample_norm_double_backward(t, g, x, value)


def distillation(student: Tensor, teacher: Tensor, g: Tensor) -> Sequence[Tensor]:
    value, shares = raw.distillation(student, teacher, 2.0)
    return value, raw.distillation_backward(g, student, teacher, shares, 2.0)


def heads(z: Tensor, g: Tensor) -> Sequence[Tensor]:
    uniform, energy, binary = (
        raw.head(name, z, y, -1.0, g) for name, y in (("oe", None), ("energy_in", None), ("bce", z))
    )
    return *uniform, *energy, *binary, raw.head_backward("oe", g, z, None, 0.0, uniform[1])


def club(mean: Tensor, log_variance: Tensor, target: Tensor) -> Sequence[Tensor]:
    value, columns = raw.club(mean, log_variance, target)
    one = torch.ones((), device="cuda")
    return value, *raw.club_backward(one, mean, log_variance, target, columns, True, True, True)


def pairwise_hinge(low: Tensor, high: Tensor) -> Sequence[Tensor]:
    return raw.pairwise_hinge(low, high, 0.5)


def extremes(score: Tensor) -> Sequence[Tensor]:
    cluster = torch.arange(len(score), device="cuda") % 7
    return *raw.cluster_extremes(score, cluster, 7, 2), *raw.cluster_extremes(score, cluster, 7, 100)


def streams(x: Tensor, w: Tensor) -> Sequence[Tensor]:
    x, w = x.bfloat16(), w.bfloat16()
    scores = raw.linear_score("energy", x, w, None, 1.0), raw.alignment(x, w)
    return *scores, *raw.subspace_energy(x, w.T), *raw.nearest_center(x, w)


WORKS: list[tuple[Callable, Sequence[Sequence[int]]]] = [
    *((energy, ((4, K), (4,))) for K in (10, 1000, 50_000)),
    *((norm, (shape, shape[:1], shape)) for shape in ((4, 10), (4, 1000), (64, 150_528))),
    *((distillation, ((4, K), (4, K), (4,))) for K in (10, 1000, 50_000)),
    *((heads, ((4, K), (4,))) for K in (10, 1000, 50_000)),
    (club, ((200, 70),) * 3),
    *((pairwise_hinge, sizes) for sizes in (((30,), (50,)), ((4096,), (9000,)))),
    (extremes, ((50_000,),)),
    *((streams, ((1000, 512), (K, 512))) for K in (10, 100, 192)),
]
every_work = pytest.mark.parametrize(
    ("work", "shapes"), WORKS, ids=[f"{work.__name__} {tuple(shapes[0])}" for work, shapes in WORKS]
)


def inputs(shapes: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
    return [randn(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def assert_same_bits(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_work
def test_captured_and_replayed(work, shapes):
    """On new inputs: nothing waits for the device, nothing is allocated outside of PyTorch."""
    given, others = inputs(shapes, 0), inputs(shapes, 100)
    work(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work(*given)
    for tensor, other in zip(given, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert_same_bits(results, work(*others))


@every_work
def test_runs_on_the_current_stream(work, shapes):
    """Inputs are written late on a stream, and read behind that."""
    given = inputs(shapes, 0)
    expected = work(*given)
    late = [torch.zeros_like(tensor) for tensor in given]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for tensor, value in zip(late, given, strict=True):
            tensor.copy_(value)
        results = work(*late)
    stream.synchronize()
    assert_same_bits(results, expected)


def test_a_stream_of_scores_on_the_current_stream():
    stream = torch.cuda.Stream()
    scores, top = torch.zeros(1000, device="cuda"), oodkern.TopK(3)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        scores[500:] = 1.0
        top.update(scores, 0)
        indices = top.result().indices
    stream.synchronize()
    assert indices.tolist() == [500, 501, 502]
