"""Every kernel of csrc/cuda: launched in the emulator, and clean under the sanitizers."""

from __future__ import annotations

import pytest
from emulate import HERE, SANITIZERS, compile_rooms, sanitized_python
from kernel_cases import kernels, launch_every_kernel


def test_every_kernel_has_a_case(root, emulated):
    """The same cases are launched on a GPU by tests/cuda/test_kernels_gpu.py."""
    launch_every_kernel()
    assert emulated.launched() == kernels(root)


@pytest.mark.slow
def test_sanitizers_pass_every_kernel(root, programs):
    done = sanitized_python(HERE / "launch_all.py", compile_rooms(programs, *SANITIZERS))
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == kernels(root)
