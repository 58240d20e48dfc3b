"""What a test needs to know of an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """One public op.

    function: the public op, of the tensors in `shapes` and nothing else (constants are bound).
    reference: the same in plain PyTorch, from oodkern.reference: the oracle, fed with float64.
    eager: what a user would write with PyTorch, in the dtype of the inputs: the yardstick of the error.
    shapes: shapes of the tensor inputs, one tuple a case.
    raw: the raw ops, each with a function that makes its arguments from one input.
    scale: standard deviation of random inputs.
    size: of float64 inputs, the magnitude that roundings of the value scale with, where its terms cancel.
    condition: of float64 inputs, what a relative rounding error of the score's precision becomes in a row of the
        gradients.
    """

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    shapes: Sequence[tuple[tuple[int, ...], ...]]
    raw: Sequence[tuple[str, Callable[[Tensor], tuple]]] = field(default=())
    scale: float = 3.0
    size: Callable[..., Tensor] = lambda *inputs: torch.zeros(())
    condition: Callable[..., Tensor] = lambda *inputs: torch.zeros(())

    def inputs(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(s, generator=generator, dtype=torch.float64) * self.scale).to(dtype) for s in shapes]
