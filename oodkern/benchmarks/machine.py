"""What numbers are taken on, and what the machine can do at best."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oodkern.benchmarks.timing import interleaved

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "liger-kernel", "cut-cross-entropy", "pytorch-ood")
COPY_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
CEILING_SECONDS = 1.0


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, the GPU where the device is one, threads, versions and the commit of the checkout."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        # The package's own word knows the build, such as +cpu; an installed one's number may not.
        "versions": {**{name: _version(name) for name in PACKAGES}, "torch": torch.__version__},
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["cuda"] = torch.version.cuda
        found["memory_bytes"] = properties.total_memory
    return found


def machine_name(found: dict[str, Any]) -> str:
    """Of `machine`: a name for a folder, such as amd-epyc-2-cores or nvidia-h200."""
    words = found["gpu"] if found["device"] == "cuda" else f"{found['cpu']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def commit() -> str | None:
    """Of the checkout that the package is in, with "-dirty" where a source was changed since; None without one."""
    own = Path(__file__)
    call = ["git", "-C", str(own.parent)]
    try:
        # A package may be installed inside somebody else's checkout.
        subprocess.run([*call, "ls-files", "--error-unmatch", own.name], capture_output=True, check=True)
        short = subprocess.run([*call, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*call, "status", "--porcelain", "--untracked-files=no", "--", ":/csrc", ":/oodkern"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return short.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Ceilings:
    """What a large copy moves and what large square products compute, in bytes and operations a second."""

    copy: float
    products: dict[str, float]

    def seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """The least time that the work can take there: of moving and computing the longer one.

        ValueError where products of the dtype were not measured.
        """
        if flops and dtype not in self.products:
            raise ValueError(f"dtype: expected one of {', '.join(self.products)}, got {dtype!r}")
        return max(bytes / self.copy, flops / self.products[dtype] if flops else 0.0)


@functools.cache
def ceilings(device: torch.device, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Ceilings:
    """Measured now, by PyTorch's own copy and products of random numbers; the best of the turns."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    sink = torch.empty_like(source)
    works = {"copy": lambda: sink.copy_(source)}
    side = SIDE[device.type]
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        works[dtype] = functools.partial(torch.mm, a, b)
    least = {name: min(times.seconds) for name, times in interleaved(works, device, CEILING_SECONDS).items()}
    return Ceilings(2 * source.nbytes / least["copy"], {dtype: 2 * side**3 / least[dtype] for dtype in dtypes})
