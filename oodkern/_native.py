"""Loads the native libraries, and tells what is missing and why.

`_cpu.so` holds every schema and the CPU kernels, `_cuda.so` the CUDA kernels. Neither uses Python or anything
of PyTorch but its stable ABI, so a library that was built once loads under every PyTorch >= 2.10. Where one
cannot be loaded, `oodkern` works all the same, with `oodkern.reference`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    from oodkern import _build as build
except ImportError as error:
    build = None
    _no_build = str(error)

FOLDER = Path(__file__).resolve().parent
HOW_TO_BUILD = "build with `pip install -e .`; `oodkern doctor` shows more"


def _load(name: str) -> str:
    """Loads one library; the reason why it is not there, or an empty string."""
    path = FOLDER / name
    if not path.is_file():
        return f"{name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load under PyTorch {torch.__version__}: {error}"
    return ""


def _load_cuda() -> str:
    if missing["cpu"]:
        return missing["cpu"]  # the schemas are there
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is CPU-only"
    if build is not None and build.cuda_reason:
        return build.cuda_reason
    return _load("_cuda.so")


# Device kind -> why its native kernels cannot be used; empty where they can.
missing: dict[str, str] = {"cpu": _load("_cpu.so")}
missing["cuda"] = _load_cuda()

if missing["cpu"]:
    warnings.warn(
        f"oodkern has no native CPU kernels ({missing['cpu']}) and computes with plain PyTorch, which gives the "
        f"same numbers more slowly: {HOW_TO_BUILD}.",
        RuntimeWarning,
        stacklevel=2,
    )


def instruction_sets() -> list[str]:
    """The instruction sets that the CPU kernels were compiled for, worst first."""
    return list(build.instruction_sets) if build is not None and not missing["cpu"] else []


def instruction_set_in_use() -> str:
    """The one of `instruction_sets()` that the CPU kernels run with."""
    index = torch.ops.oodkern.use_instruction_set(0)
    torch.ops.oodkern.use_instruction_set(index)
    return instruction_sets()[index]


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the CPU kernels with one of `instruction_sets()` instead of the best: for tests and measurements.

    Raises RuntimeError where this processor does not have it.
    """
    before = torch.ops.oodkern.use_instruction_set(instruction_sets().index(name))
    try:
        yield
    finally:
        torch.ops.oodkern.use_instruction_set(before)
