"""Every room's cases for its kernels: each `__global__` of csrc/cuda has to be launched by one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import club_cases
import distill_cases
import energy_cases
import heads_cases
import norm_cases
import pairwise_hinge_cases
import select_cases
import stream_cases

ROOMS = (
    *(energy_cases, norm_cases, distill_cases, heads_cases, club_cases, pairwise_hinge_cases, select_cases),
    stream_cases,
)


def launch_every_kernel(through: Callable = lambda function: function) -> None:
    for room in ROOMS:
        room.launch_every_kernel(through)


def kernels(root: Path) -> set[str]:
    """Names of all kernels in csrc/cuda."""
    text = "".join(file.read_text() for file in sorted((root / "csrc" / "cuda").glob("*.cu*")))
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    assert len(names) == text.count("__global__"), "a kernel that is written in another way"
    return set(names)
