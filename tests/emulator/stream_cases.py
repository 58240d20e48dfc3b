"""What the stream engine is judged by on CUDA, in the emulator and on a GPU: ops, shapes, inputs, the bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import oodkern
from oodkern import reference

DTYPES = (torch.bfloat16, torch.float16)

PHI = 0.6180339887  # a float32 of 24 bits

# (N, D, K): one of everything; tails of slabs; each number of blocks of classes, full and one over; more rows than a
# block has, and more blocks than multiprocessors.
SIZES = [
    (1, 1, 1),
    (5, 31, 10),
    (40, 64, 100),
    (33, 40, 16),
    (9, 33, 17),
    (3, 64, 64),
    (70, 96, 104),
    (20, 70, 105),
    (2, 8, 192),
    (700, 24, 3),
]
# More columns than two groups of slabs: classes come group by group where shared memory does not hold them.
LONG_SIZES = [(3, 545, 10), (40, 400, 60), (5, 333, 100), (18, 512, 192)]


def head(N: int, D: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of about unit size."""
    generator = torch.Generator().manual_seed(seed + 7 * N + 31 * D + K)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (K, D), (K,)))
    return x.to(dtype), (w * D**-0.5).to(dtype), b.to(dtype)


def linear_scores(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    scores = oodkern.linear_scores(x, w, b)
    return scores.energy, scores.joint_energy, scores.max_logit, scores.argmax, scores.msp


# Name -> the public function of features, weight and bias, and its reference.
OPS: dict[str, tuple[Callable, Callable]] = {
    "linear_energy": (
        lambda x, w, b: oodkern.linear_energy(x, w, b, 0.7),
        lambda x, w, b: reference.linear_energy(x, w, b, 0.7),
    ),
    "linear_joint_energy": (
        lambda x, w, b: oodkern.linear_joint_energy(x, w),
        lambda x, w, b: reference.linear_joint_energy(x, w),
    ),
    "linear_scores": (linear_scores, reference.linear_scores),
    "alignment": (lambda x, w, b: oodkern.alignment(x, w), lambda x, w, b: reference.alignment(x, w)),
    "subspace_energy": (
        lambda x, w, b: tuple(oodkern.subspace_energy(x, w.T)),
        lambda x, w, b: reference.subspace_energy(x, w.T),
    ),
    "subspace_energy of float32": (
        lambda x, w, b: tuple(oodkern.subspace_energy(x, (w.float() * torch.tensor(PHI)).T)),
        lambda x, w, b: reference.subspace_energy(x, (w.float() * torch.tensor(PHI)).T.double()),
    ),
    "nearest_center": (
        lambda x, w, b: tuple(oodkern.nearest_center(x, w)),
        lambda x, w, b: reference.nearest_center(x, w),
    ),
}


def judge(name: str, inputs: Sequence[Tensor], through: Callable = lambda function: function) -> None:
    """Every result against float64 of the rounded inputs: relative error under 3e-5, and 1e-6 of a unit for what
    cancels (an energy is a difference of numbers about 1)."""
    function, oracle = OPS[name]
    results = through(function)(*inputs)
    exact = oracle(*[tensor.double() for tensor in inputs])
    results, exact = ((r,) if isinstance(r, Tensor) else tuple(r) for r in (results, exact))
    assert len(results) == len(exact)
    for i, (ours, expected) in enumerate(zip(results, exact, strict=True)):
        assert ours.shape == expected.shape
        if ours.dtype == torch.int64:
            judge_index(name, ours, inputs)
            continue
        assert ours.dtype == torch.float32
        error = (ours.double() - expected).abs()
        allowed = 3e-5 * expected.abs() + 3e-6
        same = (ours.double() == expected) | (ours.isnan() & expected.isnan())
        assert (same | (error <= allowed)).all(), f"{name}, result {i}: {float((error / allowed).nan_to_num().max())}"


def judge_index(name: str, index: Tensor, inputs: Sequence[Tensor]) -> None:
    """The class that is named is the best one, or as good to rounding."""
    x, w, b = (tensor.double() for tensor in inputs)
    score = reference.linear(x, w, b) if name == "linear_scores" else -torch.cdist(x, w).square() / 2
    assert ((index >= 0) & (index < len(w))).all()
    picked = score.gather(1, index[:, None]).squeeze(1)
    assert (picked >= score.amax(1) - 1e-4).all()


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    """Each op at each number of blocks, in the dtypes in turn: those differ in how a number is widened."""
    for i, sizes in enumerate(((3, 40, 5), (3, 40, 60), (3, 40, 100), (3, 40, 192))):
        for j, name in enumerate(("linear_energy", "alignment", "subspace_energy", "nearest_center")):
            judge(name, head(*sizes, DTYPES[(i + j) % 2]), through)
