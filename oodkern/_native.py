"""Loads the native libraries, and tells what is missing and why.

`_cpu.so` holds every schema and the CPU kernels, `_cuda.so` the CUDA kernels. Neither uses Python or anything
of PyTorch but its stable ABI, so a library that was built once loads under every PyTorch >= 2.10. Where one
cannot be loaded, `oodkern` works all the same, with `oodkern.reference`.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

build: Any = None  # oodkern._build, which tells what was built
no_build = ""  # why it cannot be asked
try:
    build = importlib.import_module("oodkern._build")
except ImportError as error:
    no_build = str(error)

FOLDER = Path(__file__).resolve().parent
HOW_TO_BUILD = "build with `pip install -e .`; `oodkern doctor` shows more"


def _load(name: str) -> str:
    """Loads one library; the reason why it is not there, or an empty string."""
    path = FOLDER / name
    if not path.is_file():
        return f"{name} was not built"
    if name == "_cpu.so" and hasattr(torch.ops.oodkern, "energy"):
        return f"another copy of {name} is loaded in this process"  # registering the ops twice would end it
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
        f"same results to rounding, more slowly: {HOW_TO_BUILD}.",
        RuntimeWarning,
        stacklevel=2,
    )


def instruction_sets() -> list[str]:
    """The instruction sets that the CPU kernels can run with on this processor, worst first."""
    return [] if missing["cpu"] else torch.ops.oodkern.instruction_sets().split()


def instruction_set_in_use() -> str:
    """The one of `instruction_sets()` that the CPU kernels run with: the best, unless another was chosen."""
    return torch.ops.oodkern.instruction_set()


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the CPU kernels of the whole process with one of `instruction_sets()`: for tests and measurements.

    Raises RuntimeError where this processor does not have it.
    """
    before = instruction_set_in_use()
    torch.ops.oodkern.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.oodkern.use_instruction_set(before)
