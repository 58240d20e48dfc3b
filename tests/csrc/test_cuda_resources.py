"""What ptxas says of every kernel that is shipped."""

from __future__ import annotations

import re
import subprocess

import pytest
import toolchain
from native_build import STABLE_ABI, gencode

REPORT = re.compile(
    r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers"
)


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no CUDA compiler (nvcc) here")
def test_no_kernel_spills(root, tmp_path):
    """No stack frame and no spills; registers for two blocks of 256 threads on a multiprocessor at least."""
    include = toolchain.find_torch().path / "include"
    # The architectures that are built, those with a suffix like the others; what is PTX alone is compiled elsewhere.
    architectures = [name.removesuffix("+PTX") for name in toolchain.DEFAULT_ARCHITECTURES.split(";")][:2]
    flags = ["-std=c++20", "-O3", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA", "-isystem", str(include)]
    flags += ["-Xptxas", "-v", *(flag for name in architectures for flag in gencode(name))]
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    assert sources
    for source in sources:
        command = [toolchain.find_nvcc()[0], *flags, "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
        reports = REPORT.findall(done.stderr)
        compiled = done.stderr.count("Compiling entry function")
        assert len(reports) == compiled > 0
        spilled = [report for report in reports if any(map(int, report[1:4])) or int(report[4]) > 128]
        assert not spilled, spilled
