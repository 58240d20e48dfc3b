"""Room `norm`: the norm of each sample, and its derivatives up to the second: what a penalty on gradients pays."""

from __future__ import annotations

import functools

import torch

import oodkern
from oodkern import reference
from oodkern.benchmarks.case import COMPILED, OURS, Case, Contender, case
from oodkern.benchmarks.rooms.common import bytes_of, random_normal

CHUNK_SAMPLES = {"cpu": 1, "cuda": 64}
# Of x, in units of its bytes: read; and a gradient written; and the cotangent read, the second gradient written.
TRAFFIC = {"forward": 1, "backward": 2, "double backward": 4}


def eager_norm(x):
    """As published, too."""
    return x.norm(dim=1)


def chunked_forward(x):
    return torch.cat([eager_norm(samples) for samples in x.split(CHUNK_SAMPLES[x.device.type])])


def chunked(passes, x, *, upstream):
    """The gradient g u with u = x / |x|, and for a cotangent t its gradient g (t - (t . u) u) / |x|."""
    gradient = torch.empty_like(x)
    second = torch.empty_like(x) if passes == "double backward" else None
    size = CHUNK_SAMPLES[x.device.type]
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        samples, g = x[part].float(), upstream[part, None]
        norm = samples.norm(dim=1, keepdim=True)
        unit = samples / norm
        gradient[part] = unit * g
        if second is not None:
            cotangent = x[part].cos().float()
            along = (cotangent * unit).sum(1, keepdim=True)
            second[part] = torch.addcmul(cotangent, unit, along, value=-1).mul_(g / norm)
    return gradient if second is None else second


def random_samples(shape, dtype, generator):
    return (random_normal(generator, shape, dtype),)


@case
def sample_norm(*, N: int, D: int, dtype: str, passes: str, target: float | None = None) -> Case:
    contenders = {OURS: Contender(oodkern.sample_norm), "eager": Contender(eager_norm)}
    if passes != "double backward":  # which torch.compile refuses
        contenders[COMPILED] = Contender(eager_norm, compiled=True)
    if passes == "forward":
        contenders["chunked"] = Contender(chunked_forward)
    else:
        contenders["chunked"] = Contender(functools.partial(chunked, passes), by_hand=True)
    return Case(
        room="norm",
        title=f"sample_norm, {passes}",
        sizes={"N": N, "D": D},
        dtype=dtype,
        passes=passes,
        inputs=functools.partial(random_samples, (N, D), dtype),
        contenders=contenders,
        oracle=reference.sample_norm,
        upstream=N,
        rows=(0,),
        bytes=bytes_of((N, D), dtype) * TRAFFIC[passes] + 4 * N,
        target=target,
    )
