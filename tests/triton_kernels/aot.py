"""Compiles every kernel for GPUs that are not there, and reports what became of it, as JSON lines.

The first line has the rows of the table of tiles that were asked for.

    python tests/triton_kernels/aot.py [sm_80 sm_90 sm_100] [names of cases]

Host functions are called with tensors of the CPU, as if on a GPU of each architecture; what they would launch is
recorded instead, and compiled with the types, constants and alignments that it would have there.
Not under TRITON_INTERPRET=1, where there is nothing to compile. Runs under any Triton that is first on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import CASES, Numbers

from oodkern.triton_kernels import _host, configs, linear_energy

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}
# Compute capability, what GPUs of it have of shared memory for a program, and the matrix instruction of 16 bits.
ARCHITECTURES = {
    "sm_80": (80, 163 * 1024, "mma.sync"),
    "sm_90": (90, 227 * 1024, "wgmma.mma_async"),
    "sm_100": (100, 227 * 1024, "tcgen05.mma"),
}
# Each architecture compiles one of the 16-bit dtypes: their tiles are the same.
SIXTEEN = {"sm_80": torch.float16, "sm_90": torch.bfloat16, "sm_100": torch.float16}
TILE_ROWS = 128
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Launch:
    """A kernel with all that its compilation depends on."""

    module: str
    kernel: str
    arch: str
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def launched(kernel: triton.JITFunction, arch: str, arguments: tuple, keywords: dict[str, Any]) -> Launch:
    """What compiling for these arguments depends on, as Triton specialises them."""
    launch = Launch(kernel.fn.__module__, kernel.fn.__name__, arch)
    launch.options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for name, value in {**dict(zip(kernel.arg_names, arguments)), **keywords}.items():  # noqa: B905 the rest are keywords
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            launch.signature[name], launch.constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            launch.signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            launch.signature[name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                launch.aligned.append(name)
        elif isinstance(value, float):
            launch.signature[name] = "fp32"
        else:
            launch.signature[name] = "i64" if value >= 1 << 31 else "i32"
            if value % 16 == 0:
                launch.aligned.append(name)
    assert list(launch.signature) == kernel.arg_names, f"{launch.kernel}: arguments {list(launch.signature)}"
    return launch


ROWS: set[tuple[str, int, str]] = set()


def looked_up(kernel: str, dtype: torch.dtype, K: int, *arguments: Any) -> configs.Tile:
    ROWS.add((kernel, dtype.itemsize * 8, configs.shape_class(K)))
    return configs.config(kernel, dtype, K, *arguments)


def launches(arch: str, names: Sequence[str]) -> Iterator[Launch]:
    """What the cases (all, unless named) launch on a GPU of this architecture.

    Of launches that differ in alignment alone the most aligned, and on sm_80, which takes pointers everywhere, the
    least aligned too.
    """
    record: list[Launch] = []

    def run(kernel: triton.JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        record.append(launched(kernel, arch, arguments, keywords))

    triton.JITFunction.run = run
    _host.arch_of = lambda device: arch
    _host.config = looked_up
    linear_energy.processors = lambda device: 2
    for dtype in (SIXTEEN[arch], torch.float32):
        for case in (one for one in CASES if not names or one.__name__ in names):
            case(Numbers(dtype, TILE_ROWS))
    kinds: dict[str, list[Launch]] = {}
    for launch in record:
        kinds.setdefault(json.dumps(asdict(replace(launch, aligned=[]))), []).append(launch)
    for same in kinds.values():
        same.sort(key=lambda launch: len(launch.aligned))
        yield same[-1]
        if arch == "sm_80" and len(same[0].aligned) < len(same[-1].aligned):
            yield same[0]


def compiled(launch: Launch) -> dict[str, Any]:
    """Compiles a launch; what is wrong with it is in "faults"."""
    capability, most_shared, instruction = ARCHITECTURES[launch.arch]
    kernel = getattr(sys.modules[launch.module], launch.kernel)
    position = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        launch.signature,
        {position[name]: value for name, value in launch.constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    told = {
        "kernel": launch.kernel,
        "arch": launch.arch,
        "signature": launch.signature,
        "constants": launch.constants,
        "options": launch.options,
    }
    try:
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    except Exception as error:  # of the compiler or of the assembler: the other launches are told all the same
        return {**told, "faults": [f"{type(error).__name__}: {str(error)[:2000]}"]}
    ptx, shared = result.asm["ptx"], result.metadata.shared
    registers, spills = assembled(ptx, capability)
    operands = {kind for kind in launch.signature.values() if "16" in kind and kind[0] in "*t"}
    faults = []
    if operands and "tt.dot" in result.asm["ttir"] and instruction not in ptx:
        faults.append(f"no {instruction}")
    if shared > most_shared:
        faults.append(f"{shared} bytes of shared memory, of {most_shared}")
    if spills > spills_allowed():
        faults.append(f"{spills} bytes spilled")
    return {**told, "registers": registers, "shared": shared, "faults": faults}


def spills_allowed() -> int:
    """Bytes: none by the Tritons that the tiles were chosen with, 3.6 and from 3.9 on. Others allocate otherwise:
    3.8 spills 4 and 24 bytes in two float32 kernels."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return 0 if version == (3, 6) or version >= (3, 9) else 32


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, bytes spilled) by the assembler that Triton has for this capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", str(file)]
        told = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores", told)
    registers = re.search(r"Used (\d+) registers", told)
    assert spills is not None, told
    assert registers is not None, told
    return int(registers[1]), int(spills[1])


def main() -> None:
    warnings.simplefilter("ignore")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled")
    architectures = [name for name in sys.argv[1:] if name in ARCHITECTURES]
    names = [name for name in sys.argv[1:] if name not in ARCHITECTURES]
    todo = [launch for arch in architectures or ARCHITECTURES for launch in launches(arch, names)]
    print(json.dumps({"rows": sorted(ROWS)}), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
            for report in pool.map(compiled, todo):
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
