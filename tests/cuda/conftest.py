import sys
from pathlib import Path

import pytest

import oodkern
from oodkern import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulator"))


@pytest.fixture(autouse=True)
def native():
    """Every test here is of the CUDA kernels."""
    if _native.missing["cuda"]:
        pytest.skip(f"no CUDA kernels: {_native.missing['cuda']}")
    with oodkern.backend("native"):
        yield
