"""Hypothesis strategies: tensors as users have them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def layouts(draw, columns=(1, 2, 7, 8, 17, 64, 100, 1000, 1031, 2500), dtypes=FLOATS, extreme: bool = True):
    """A tensor [N, K] with any strides and offset, possibly with extreme values in it."""
    rows = draw(st.integers(0, 20))
    K = draw(st.sampled_from(columns))
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(("dense", "transposed", "sliced rows", "sliced columns", "offset", "expanded", "3-D")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype)

    tensor = {
        "dense": lambda: random(rows, K),
        "transposed": lambda: random(K, rows).T,
        "sliced rows": lambda: random(2 * rows + 1, K)[1::2],
        "sliced columns": lambda: random(rows, 2 * K + 1)[:, 1::2],
        "offset": lambda: random(rows * K + 3)[3:].view(rows, K),
        "expanded": lambda: random(1, K).expand(rows, K),
        "3-D": lambda: random(rows, 3, K).transpose(0, 1),
    }[kind]()
    if extreme and rows and kind != "expanded" and draw(st.booleans()):
        limit = 6e4 if dtype == torch.float16 else 1e4
        values = draw(st.lists(st.sampled_from((-torch.inf, limit, -limit, 0.0, 88.0, -104.0)), min_size=1, max_size=6))
        for i, value in enumerate(values):
            tensor[..., i % tensor.shape[-2], draw(st.integers(0, K - 1))] = value
    return tensor
