"""Who computes an op: the native kernels, Triton's, or plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch

from oodkern import _native, triton_kernels

BACKENDS = ("native", "triton", "reference")

# Room -> kind of device -> its kernels, best first. `reference` serves every room and device.
KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "energy": {"cpu": ("native",), "cuda": ("native",)},
    "norm": {"cpu": ("native",), "cuda": ("native",)},
    "linear_energy": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "subspace": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
    "contrast": {"cpu": ("native", "triton"), "cuda": ("triton",)},
    "heads": {"cpu": ("native",), "cuda": ("native",)},
    "club": {"cpu": ("native",), "cuda": ("native",)},
    "pairwise_hinge": {"cpu": ("native",), "cuda": ("native",)},
    "extremes": {"cpu": ("native",), "cuda": ("native",)},
    "distill": {"cpu": ("native",), "cuda": ("native",)},
    "select": {"cpu": ("native", "triton"), "cuda": ("native", "triton")},
}

# Rooms whose native CUDA kernels stream features past a few classes, forward alone -> the backend that their
# derivatives need, without which the kernels are not taken; None where there are no derivatives.
STREAMS = {"linear_energy": "triton", "subspace": "triton", "select": None}
STREAM_DTYPES = (torch.bfloat16, torch.float16)
STREAM_CLASSES = 192
STREAM_FEATURES = 1 << 20

OLDEST_GPU = 80  # what csrc/cuda is compiled for begins here

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The backend that `backend()` demands, process-wide: a plain global, which torch.compile guards on.
_demanded: str | None = None


def choose_backend(
    room: str,
    N: int,
    D: int,
    K: int,
    dtype: torch.dtype,
    arch: str,
    available: Collection[str] = BACKENDS,
) -> str:
    """Which backend computes `room` for N rows of D features and K classes.

    A pure function of its arguments: `arch` is "cpu" or a CUDA architecture such as "sm_90", `available` the
    backends that can be used there (all, unless told). D is 0 where a room is given logits. Returns one of
    "native", "triton", "reference". Raises ValueError for a room that does not exist.
    """
    if room not in KERNELS:
        raise ValueError(f"room: expected one of {', '.join(KERNELS)}, got {room!r}")
    device = "cuda" if arch.startswith("sm_") else arch
    if dtype in DTYPES:
        for name in KERNELS[room].get(device, ()):
            if name == "native" and device == "cuda":
                old = int(arch.removeprefix("sm_")) < OLDEST_GPU
                if old or (room in STREAMS and not _streams(room, D, K, dtype, available)):
                    continue
            if name in available and not (name == "triton" and dtype == torch.float64):
                return name
    return "reference"


def _streams(room: str, D: int, K: int, dtype: torch.dtype, available: Collection[str]) -> bool:
    """Whether native CUDA kernels stream such a product."""
    fits = dtype in STREAM_DTYPES and 1 <= K <= STREAM_CLASSES and 1 <= D <= STREAM_FEATURES
    return fits and (STREAMS[room] is None or STREAMS[room] in available)


def available_backends(device: str) -> tuple[str, ...]:
    """The backends that can be used for tensors of a device type in this process."""
    return (*(name for name in ("native", "triton") if not missing(name, device)), "reference")


def missing(name: str, device: str) -> str:
    """Why "native" or "triton" cannot be used on a device type; empty where it can."""
    known = _native.missing if name == "native" else triton_kernels.missing
    return known.get(device, f"it has no kernels for {device}")


def arch_of(device: torch.device) -> str:
    """ "cpu", or the CUDA architecture of a GPU, or the type of any other device."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return device.type


def backend_for(room: str, tensor: torch.Tensor, K: int | None = None) -> str:
    """The backend for `room`: the one demanded by `backend()`, else `choose_backend`'s.

    `tensor` is [..., K] logits or, where the number of classes K is given, [..., D] features.
    """
    device = tensor.device.type
    available = available_backends(device)
    if _demanded is not None:
        offered = (*KERNELS[room].get(device, ()), "reference")
        if _demanded not in offered or _demanded not in available:
            why = missing(_demanded, device) if _demanded in offered else f"it has {', '.join(offered)}"
            raise RuntimeError(f"backend({_demanded!r}) cannot compute `{room}` on {device}: {why}")
        return _demanded
    if available == ("reference",):
        return "reference"  # without asking a GPU what it is
    columns = tensor.shape[-1]
    rows = tensor.numel() // columns if columns else 0
    D, K = (0, columns) if K is None else (columns, K)
    return choose_backend(room, rows, D, K, tensor.dtype, arch_of(tensor.device), available)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Demands a backend for every op inside: "reference", "native" or "triton".

    Meant for tests and comparisons; without it the best available one is taken. The demand holds for the whole
    process, not for one thread. An op that the backend cannot compute raises RuntimeError instead of quietly
    taking another. Raises ValueError for an unknown name.
    """
    global _demanded
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    before, _demanded = _demanded, name
    try:
        yield
    finally:
        _demanded = before
