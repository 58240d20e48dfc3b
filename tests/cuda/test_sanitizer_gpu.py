"""Every kernel of csrc/cuda under compute-sanitizer, where that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAUNCH = """
import sys
sys.path[:0] = sys.argv[1:]
import oodkern
from gpu import through_gpu
from kernel_cases import launch_every_kernel
with oodkern.backend("native"):
    launch_every_kernel(through_gpu)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(root, tool):
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer here")
    paths = [str(root / "tests" / name) for name in ("emulator", "cuda", ".")]
    # Uncached: each tensor is an allocation of its own, whose ends memcheck knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(root)}
    # What PyTorch asks the driver for and does not get is no error of a kernel.
    command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    if tool != "initcheck":  # which has to see what PyTorch's own kernels write
        command += ["--kernel-name", "kernel_substring=oodkern"]
    done = subprocess.run(
        [*command, sys.executable, "-c", LAUNCH, *paths], env=environment, capture_output=True, text=True, cwd=Path("/")
    )
    if tool == "initcheck" and done.returncode == 9:
        assert "oodkern" not in done.stdout, done.stdout[-5000:]
        return
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
