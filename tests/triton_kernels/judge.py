"""Raw ops of Triton against float64: gradients for random upstreams, judged by rows with the two-sided bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from oracle import assert_two_sided
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16)
OPS = torch.ops.oodkern_triton


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [(t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_() for t in inputs]


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstreams: Sequence[Tensor]
) -> list[Tensor]:
    outputs = function(*inputs)
    upstreams = [u.to(output.dtype) for u, output in zip(upstreams, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, inputs, upstreams))


def assert_gradients(
    ours: Sequence[Tensor],
    reference: Callable[..., Sequence[Tensor]],
    eager: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstreams: Sequence[Tensor],
    what: str,
    condition: float = 0.0,
    sizes: Sequence[Tensor | None] = (None, None),
) -> None:
    """`ours` against those of `reference` in float64; `eager`, in the dtype of the inputs, is the yardstick.

    `sizes`: of each gradient, the magnitude of the terms that cancel in it.
    """
    oracle = gradients(reference, leaves(inputs, torch.float64), upstreams)
    yardstick = gradients(eager, leaves(inputs), upstreams)
    for i, (our, exact, same) in enumerate(zip(ours, oracle, yardstick, strict=True)):
        assert our.dtype == inputs[i].dtype, f"{what}: gradient {i} has dtype {our.dtype}"
        assert_two_sided(
            our, exact, same, f"{what}, gradient {i}", rows=our.dim() > 1, size=sizes[i], condition=condition
        )


def in_small_waves(monkeypatch, *modules) -> None:
    """Waves of 16 rows and one split: several waves of several tiles, and programs that walk over several tiles."""
    for module in modules:
        monkeypatch.setattr(
            module, "waves", lambda N, *_: ((begin, min(begin + 16, N)) for begin in range(0, N, 16)), raising=False
        )
        monkeypatch.setattr(module, "split_columns", lambda row_tiles, K, columns: (1, K))
