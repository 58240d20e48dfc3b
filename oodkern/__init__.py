"""Fast, memory-lean training with auxiliary outliers for out-of-distribution detection.

Three levels, each of which works alone:

1. ops: `oodkern.energy(logits)` in any training loop;
2. losses: `oodkern.losses.EnergyLoss()(logits, target)`, plain tensors in, scalar out;
3. training: `oodkern train config.yaml method=energy`, and `oodkern.load(run).predict(images)`.

Importing this package needs torch and numpy alone; the rest is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from oodkern.backends import backend, choose_backend
from oodkern.ops import (
    TopK,
    Upstream,
    alignment,
    bce_head,
    club,
    cluster_extremes,
    distillation,
    energy,
    energy_head,
    gradient_penalty,
    info_nce,
    input_gradient_norm,
    joint_energy,
    linear_energy,
    linear_joint_energy,
    linear_scores,
    nearest_center,
    oe_head,
    orthonormal_basis,
    pairwise_hinge,
    sample_norm,
    subspace_energy,
)

if TYPE_CHECKING:
    from oodkern.detector import load

__version__ = "0.1.0"
__all__ = [
    "TopK",
    "Upstream",
    "alignment",
    "backend",
    "bce_head",
    "choose_backend",
    "club",
    "cluster_extremes",
    "distillation",
    "energy",
    "energy_head",
    "gradient_penalty",
    "info_nce",
    "input_gradient_norm",
    "joint_energy",
    "linear_energy",
    "linear_joint_energy",
    "linear_scores",
    "load",
    "losses",
    "metrics",
    "models",
    "nearest_center",
    "oe_head",
    "orthonormal_basis",
    "pairwise_hinge",
    "reference",
    "sample_norm",
    "subspace_energy",
]

_MODULES = (
    *("config", "data", "detector", "export", "losses", "methods", "metrics", "models", "pools", "reference"),
    *("synthesis", "training"),
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"oodkern.{name}")
    if name == "load":
        return importlib.import_module("oodkern.detector").load
    raise AttributeError(f"module 'oodkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "load"})
