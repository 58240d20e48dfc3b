"""Differentiable functions over the kernels: level 1 of use. Everything here is also a name of `oodkern`."""

from oodkern.ops.energy import energy, joint_energy

__all__ = ["energy", "joint_energy"]
