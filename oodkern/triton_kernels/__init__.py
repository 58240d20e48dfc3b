"""Triton's kernels as raw ops: `torch.ops.oodkern_triton` has what `torch.ops.oodkern` has, under the same schemas.

One module a room, each with a host function of the op's name. They are imported at the first call, so that importing
oodkern does not import Triton. The ops run on CUDA tensors, and on CPU tensors under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before Triton is imported), which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from oodkern import _native

NAMESPACE = "oodkern_triton"
OPS = {
    "linear_energy": ("linear_score", "linear_score_backward", "linear_score_double_backward", "linear_scores"),
    "subspace": (
        *("alignment", "alignment_backward"),
        *("subspace_energy", "subspace_energy_backward", "subspace_energy_double_backward"),
    ),
    "contrast": ("info_nce", "info_nce_backward"),
    "select": ("nearest_center",),
}


def has(name: str) -> bool:
    """Whether a raw op is among Triton's."""
    return any(name in names for names in OPS.values())


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:  # where an importer forbids it
        return False


def _missing(device: str) -> str:
    """Why Triton's kernels cannot be used on a device; empty where they can."""
    if _native.missing["cpu"]:
        return f"their schemas are not there, {_native.missing['cpu']}"
    if not _installed():
        return "Triton is not installed: pip install triton"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton computes on the CPU under its interpreter alone (TRITON_INTERPRET=1)"
    return ""


missing: dict[str, str] = {device: _missing(device) for device in ("cpu", "cuda")}


def _register(room: str, name: str) -> None:
    def call(*arguments: Any) -> Any:
        host = getattr(importlib.import_module(f"{__name__}.{room}"), name)
        device = next(tensor.device.type for tensor in arguments if isinstance(tensor, torch.Tensor))
        # Neither is off inside of a raw op by itself: autocast would round the float32 sums that products add to.
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return host(*arguments)

    schema = str(getattr(torch.ops.oodkern, name).default._schema).removeprefix("oodkern::")
    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, call, device)


LIBRARY = torch.library.Library(NAMESPACE, "DEF")
if not missing["cuda"]:
    for room, names in OPS.items():
        for name in names:
            _register(room, name)
