"""Tile sizes of every kernel, in one table. Nothing is tuned at run time: results repeat bit for bit across runs.

A tile is chosen by kernel, bits of the dtype, number of classes and architecture. Every one is compiled ahead of time
by tests/triton_kernels/test_aot.py, which fails on a spill or where the matrix instructions are not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Up to here one tile of "few" holds all classes.
FEW_CLASSES = 64


@dataclass(frozen=True)
class Tile:
    """Rows by classes of a tile of the product, columns of both operands in a step, and how programs run.

    `resident` programs share a multiprocessor where programs walk over their tiles.
    """

    rows: int
    classes: int
    depth: int
    warps: int = 8
    stages: int = 3
    descriptors: bool = False
    resident: int = 1

    def constants(self, descriptors: bool = True) -> dict[str, int | bool]:
        """The constants and options of a launch; DESCRIPTORS only with `descriptors`."""
        constants: dict[str, int | bool] = {"ROWS": self.rows, "CLASSES": self.classes, "DEPTH": self.depth}
        if descriptors:
            constants["DESCRIPTORS"] = self.descriptors
        return {**constants, "num_warps": self.warps, "num_stages": self.stages}


# Tiles of 16-bit operands. On sm_90 wgmma wants tiles as wide as registers allow: 256 classes are 245 of 255 registers
# for the energy alone; with anything else they spill, as they do on sm_100 always. Those for sm_80 take 64 KiB of
# shared memory, which consumer GPUs have too.
AMPERE = Tile(128, 128, 32, stages=4)
AMPERE_FEW = Tile(128, 64, 32, stages=4, resident=2)
AMPERE_TWO = Tile(64, 64, 32, stages=4)
WIDEST = Tile(128, 256, 64, descriptors=True)
WIDE = Tile(128, 128, 64, descriptors=True)
WIDE_FEW = Tile(128, 64, 64, descriptors=True, resident=2)
# With 8 warps the register allocator spills JointEnergy's 4 bytes on sm_100 while it leaves two thirds unused.
WIDE_FEW_4 = Tile(128, 64, 64, warps=4, descriptors=True, resident=2)
# Float32 has no matrix instructions: a product is multiplications and additions in registers, which hold less.
FULL = Tile(64, 64, 16, resident=2)
# With one stage more the register allocator spills 8 bytes of InfoNCE and alignment, though registers are left.
AMPERE_SHORT = Tile(128, 64, 32, stages=3)
FULL_SHORT = Tile(64, 64, 16, stages=2)
FULL_TWO = Tile(64, 32, 16, resident=2)
# Small, with bounds in every direction for small tests; descriptors there are Triton's own emulation.
INTERPRETED = Tile(16, 32, 16, descriptors=True)

# (kernel, bits of the operands, "few" or "many" classes) -> architecture -> tile.
TABLE: dict[tuple[str, int, str], dict[str, Tile]] = {}


def _row(kernel: str, bits: int, classes: str, sm_80: Tile, sm_90: Tile, sm_100: Tile) -> None:
    TABLE[kernel, bits, classes] = {"sm_80": sm_80, "sm_90": sm_90, "sm_100": sm_100, "interpreter": INTERPRETED}


# Room `linear_energy`. Two products at a time, of logits and their tangents, take twice the registers.
_row("linear_energy", 16, "many", AMPERE, WIDEST, WIDE)
_row("linear_joint_energy", 16, "many", AMPERE, WIDE, WIDE)
_row("linear_scores", 16, "many", AMPERE, WIDE, WIDE)
_row("linear_slope", 16, "many", AMPERE, WIDE, WIDE_FEW)
_row("linear_tangent", 16, "many", AMPERE_TWO, WIDE_FEW, WIDE_FEW)
_row("linear_curvature", 16, "many", AMPERE_TWO, WIDE_FEW, WIDE_FEW)
for _kernel in ("linear_energy", "linear_joint_energy", "linear_scores", "linear_slope"):
    joint = _kernel == "linear_joint_energy"
    _row(_kernel, 16, "few", AMPERE_FEW, WIDE_FEW, WIDE_FEW_4 if joint else WIDE_FEW)
    _row(_kernel, 32, "many", FULL, FULL, FULL)
    _row(_kernel, 32, "few", FULL, FULL, FULL)
for _kernel in ("linear_tangent", "linear_curvature"):
    _row(_kernel, 16, "few", AMPERE_TWO, WIDE_FEW, WIDE_FEW)
    _row(_kernel, 32, "many", FULL_TWO, FULL_TWO, FULL_TWO)
    _row(_kernel, 32, "few", FULL_TWO, FULL_TWO, FULL_TWO)

# Products in float32 proper, of every room.
_row("product", 32, "many", FULL, FULL, FULL)
_row("product", 32, "few", FULL, FULL, FULL)

# Rooms `subspace`, `contrast` and `select`.
for _kernel in ("alignment", "sign", "nearest_center"):
    _row(_kernel, 16, "many", AMPERE, WIDE, WIDE)
    _row(_kernel, 16, "few", AMPERE_FEW, WIDE_FEW, WIDE_FEW)
# Beside a tile of 128 keys their norms, logsumexps, weights and labels take so many registers that 500 bytes spill.
for _classes in ("few", "many"):
    _row("contrast", 16, _classes, AMPERE_SHORT, WIDE_FEW, WIDE_FEW)
    _row("contrast_gradient", 16, _classes, AMPERE_FEW, WIDE_FEW, WIDE_FEW)
    for _kernel in ("alignment", "contrast"):
        _row(_kernel, 32, _classes, FULL_SHORT, FULL_SHORT, FULL_SHORT)
    for _kernel in ("sign", "residual", "contrast_gradient", "nearest_center"):
        _row(_kernel, 32, _classes, FULL, FULL, FULL)


def architecture(arch: str) -> str:
    """The column of the table for "sm_86", "sm_103", ..., or "cpu", which is the interpreter.

    Hopper and data-centre Blackwell have instructions of their own; every other GPU runs what Ampere runs.
    """
    if not arch.startswith("sm_"):
        return "interpreter"
    major = int(arch.removeprefix("sm_")) // 10
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def shape_class(K: int) -> str:
    return "few" if K <= FEW_CLASSES else "many"


def config(kernel: str, dtype: torch.dtype, K: int, arch: str, descriptors: bool = True) -> Tile:
    """The tile of a kernel: a pure function of its arguments. `arch` as `oodkern.backends.arch_of` names it.

    Without `descriptors`, where operands are not aligned for them, it is the one for sm_80, which needs none.
    """
    row = TABLE[kernel, dtype.itemsize * 8, shape_class(K)]
    tile = row[architecture(arch)]
    if tile.descriptors and not descriptors:
        return replace(tile, descriptors=False) if tile == row["interpreter"] else row["sm_80"]
    return tile
