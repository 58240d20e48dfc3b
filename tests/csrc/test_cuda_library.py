"""The CUDA library that was installed: what ptxas said of its kernels, and what it registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import native_build
import pytest
import torch

from oodkern import _native

REPORT = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'\n.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def installed(root):
    if not (root / "oodkern" / "_cuda.so").is_file():
        pytest.skip("_cuda.so was not built: it needs a CUDA build of PyTorch and nvcc, or OODKERN_BUILD=cuda")


# Kernels whose sums are a warp's rows times all classes: one block of 256 threads a multiprocessor, by launch bounds.
ALONE = ("stream_rows", "subspace_rows")


def registers_of(kernel: str) -> int:
    """What a kernel may have: two blocks of 256 threads run on a multiprocessor, or one."""
    return 255 if any(name in kernel for name in ALONE) else 128


def test_no_kernel_spills(root, installed):
    """No stack frame and no spills, and no more registers than leave room for the blocks that are meant to run."""
    for source in sorted((root / "csrc" / "cuda").glob("*.cu")):
        said = (native_build.build_folder() / f"cuda.{source.stem}.o.log").read_text()
        reports = REPORT.findall(said)
        assert len(reports) == said.count("Compiling entry function") > 0
        assert {architecture for _, architecture, *_ in reports} >= {"sm_80", "sm_90"}
        spilled = [
            report for report in reports if any(map(int, report[2:5])) or int(report[5]) > registers_of(report[0])
        ]
        assert not spilled, spilled
        assert "warning" not in said


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or Triton's."""
    found, triton = shutil.which("cuobjdump"), importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    return found


def test_streams_use_tensor_cores_and_wide_loads(installed):
    """On every architecture, without a word of local memory."""
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump: the CUDA toolkit has it, and Triton")
    made = native_build.build_folder() / "cuda.stream.o"
    done = subprocess.run([program, "-sass", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [text for text in done.stdout.split("Function : ")[1:] if registers_of(text.split("\n")[0]) == 255]
    assert len(kernels) >= 32  # two dtypes, four sizes, two kernels, two architectures
    for text in kernels:
        for instruction in ("HMMA.16816.F32", "LDS.128", "LDG.E.128", "LDGSTS.E.BYPASS.128"):
            assert instruction in text, f"{text.split()[0]}: no {instruction}"
        assert not re.search(r"\b(LDL|STL)\b", text), f"{text.split()[0]}: local memory"


def test_every_room_is_registered(root, installed):
    """What the sources register, they register for CUDA, and PyTorch has it where it is a CUDA build."""
    if torch.version.cuda is None:
        assert "CPU-only" in _native.missing["cuda"]
        return
    assert _native.missing["cuda"] == ""
    sources = [*(root / "csrc").glob("*.h"), *(root / "csrc" / "cuda").glob("*.cu*")]
    names = {name for file in sources for name in re.findall(r'm\.impl\("(\w+)"', file.read_text())}
    assert len(names) > 20
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oodkern::{name}", "CUDA"), name
