"""How much is multiplied within a `with`."""

import torch

from oodkern import _native


class Products:
    """How many products of a shape are formed within."""

    def __init__(self, shape):
        self.size = shape[0] * shape[1] * shape[2]

    def __enter__(self):
        self.before = torch.ops.oodkern.multiplications()
        return self

    def __exit__(self, *_):
        self.count = (torch.ops.oodkern.multiplications() - self.before) / max(self.size, 1)


def multiplies_bfloat16():
    """Whether bfloat16 is multiplied as it is here, and not widened first."""
    return _native.instruction_set_in_use() in ("avx512_bf16", "amx")
