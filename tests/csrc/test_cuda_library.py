"""The CUDA library that was installed: what ptxas said of its kernels, and what it registers."""

from __future__ import annotations

import re

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


def test_no_kernel_spills(root, installed):
    """No stack frame and no spills; registers for two blocks of 256 threads on a multiprocessor at least."""
    for source in sorted((root / "csrc" / "cuda").glob("*.cu")):
        said = (native_build.build_folder() / f"cuda.{source.stem}.o.log").read_text()
        reports = REPORT.findall(said)
        assert len(reports) == said.count("Compiling entry function") > 0
        assert {architecture for _, architecture, *_ in reports} >= {"sm_80", "sm_90"}
        spilled = [report for report in reports if any(map(int, report[2:5])) or int(report[5]) > 128]
        assert not spilled, spilled
        assert "warning" not in said


def test_every_room_is_registered(root, installed):
    """What the sources register, they register for CUDA, and PyTorch has it where it is a CUDA build."""
    if torch.version.cuda is None:
        assert "CPU-only" in _native.missing["cuda"]
        return
    assert _native.missing["cuda"] == ""
    sources = [*(root / "csrc").glob("*.h"), *(root / "csrc" / "cuda").glob("*.cu*")]
    names = {name for file in sources for name in re.findall(r'm\.impl\("(\w+)"', file.read_text())}
    assert len(names) >= 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"oodkern::{name}", "CUDA"), name
