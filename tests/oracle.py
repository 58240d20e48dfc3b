"""How a result is judged: the float64 oracle, the two-sided bound, what was allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# How far rounding may put us from the oracle, in units of the precision that we compute with. Eager PyTorch is the
# yardstick (twice its error is allowed); this floor serves where eager happens to be exact. In float64 the oracle
# rounds as much as we do, in another order.
SLACK = 8.0
SLACK_FLOAT64 = 64.0
# A 16-bit result is computed in float32 and rounded once: half a unit in the last place, and no more.
ONE_ROUNDING = 0.501


def like(tensor: Tensor, seed: int = 7) -> Tensor:
    """A random tensor of the same shape and dtype: an upstream gradient is never ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def largest(tensor: Tensor) -> Tensor:
    """The largest magnitude in each row, kept beside the row."""
    return tensor.abs().amax(-1, keepdim=True) if tensor.dim() and tensor.shape[-1] else tensor.abs()


def assert_two_sided(
    ours: Tensor,
    oracle: Tensor,
    eager: Tensor,
    what: str = "value",
    *,
    rows: bool = False,
    size: Tensor | None = None,
    condition: Tensor | float = 0.0,
) -> None:
    """error <= 2 * error of same-dtype eager + (SLACK + condition) * eps * size + one rounding to 16 bits.

    `oracle` is float64 of the rounded inputs; eps is that of the arithmetic (float32 for 16-bit results). Scores are
    judged one by one; for gradients (`rows`) the errors and sizes of a row are its largest, so that a row is not
    forgiven because another one is large. `size` is the magnitude that the roundings scale with where that is not
    the result's own: where terms cancel.
    """
    assert ours.shape == oracle.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    error = (ours.double() - oracle).abs()
    eager_error = (eager.double() - oracle).abs()
    size = oracle.abs() if size is None else torch.maximum(oracle.abs(), size)
    if rows:
        eager_error, size = largest(eager_error), largest(size)
    limits = torch.finfo(ours.dtype)
    arithmetic = limits if ours.dtype == torch.float64 else torch.finfo(torch.float32)
    slack = SLACK_FLOAT64 if ours.dtype == torch.float64 else SLACK
    allowed = 2 * eager_error + (slack + condition) * arithmetic.eps * size + arithmetic.tiny
    if limits.bits == 16:
        allowed = allowed + ONE_ROUNDING * limits.eps * oracle.abs() + limits.tiny * limits.eps
    same = (ours.double() == oracle) | (ours.isnan() & oracle.isnan())
    bad = ~(same | (error <= allowed))
    worst = float((error / allowed)[bad].max()) if bad.any() else 0.0
    assert not bad.any(), f"{what}: {int(bad.sum())} of {bad.numel()} off; worst {worst:.2f} times the bound"


def value_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], order: int = 1) -> list[Tensor]:
    """The value, the gradients for a random upstream, and for order 2 those of the gradients for random cotangents."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]  # views stay views: the op sees their strides
    value = function(*inputs)
    upstream = like(value).requires_grad_()
    gradients = torch.autograd.grad(value, inputs, upstream, create_graph=order > 1)
    results = [value.detach(), *(gradient.detach() for gradient in gradients)]
    if order > 1:
        # Against float64 the cotangents must be the same numbers: round them to the inputs' dtype first.
        cotangents = [like(gradient, seed=11) for gradient in gradients]
        second = torch.autograd.grad(gradients, [upstream, *inputs], cotangents, allow_unused=True)
        results += [tensor.detach() for tensor in second if tensor is not None]
    return results


def in_float64(function: Callable[..., Tensor], inputs: Sequence[Tensor], order: int = 1) -> list[Tensor]:
    """`value_and_gradients` of the oracle: float64 arithmetic on the rounded inputs, upstreams and cotangents."""
    dtype = inputs[0].dtype
    score = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    upstream = like(value.to(score)).double().requires_grad_()
    gradients = torch.autograd.grad(value, inputs, upstream, create_graph=order > 1)
    results = [value.detach(), *(gradient.detach() for gradient in gradients)]
    if order > 1:
        cotangents = [like(gradient.to(dtype), seed=11).double() for gradient in gradients]
        second = torch.autograd.grad(gradients, [upstream, *inputs], cotangents, allow_unused=True)
        results += [tensor.detach() for tensor in second if tensor is not None]
    return results


def memory_events(work: Callable[[], object]) -> list[int]:
    """What `work` allocates (positive) and frees (negative) on the CPU, in bytes, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def allocations(work: Callable[[], object]) -> list[int]:
    return [change for change in memory_events(work) if change > 0]
