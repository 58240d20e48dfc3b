"""Differentiable functions over the kernels: level 1 of use. Everything here is also a name of `oodkern`."""

from oodkern.ops._foreseen import Upstream
from oodkern.ops.club import club
from oodkern.ops.contrast import info_nce
from oodkern.ops.distill import distillation
from oodkern.ops.energy import energy, joint_energy
from oodkern.ops.heads import bce_head, energy_head, oe_head
from oodkern.ops.linear_energy import linear_energy, linear_joint_energy, linear_scores
from oodkern.ops.pairwise_hinge import pairwise_hinge
from oodkern.ops.select import cluster_extremes, nearest_center
from oodkern.ops.subspace import alignment, orthonormal_basis, subspace_energy
from oodkern.ops.top_k import TopK

__all__ = [
    "TopK",
    "Upstream",
    "alignment",
    "bce_head",
    "club",
    "cluster_extremes",
    "distillation",
    "energy",
    "energy_head",
    "info_nce",
    "joint_energy",
    "linear_energy",
    "linear_joint_energy",
    "linear_scores",
    "nearest_center",
    "oe_head",
    "orthonormal_basis",
    "pairwise_hinge",
    "subspace_energy",
]
