from __future__ import annotations

import os
import platform
import shutil

import pytest
from emulate import LIBRARY, compile_rooms
from emulated import EmulatedOps


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder in which the emulator's programs are compiled, each once."""
    if platform.system() != "Linux" or not shutil.which("g++"):
        pytest.skip("the emulator of CUDA kernels needs Linux and g++")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers
    (folder / "emulator").mkdir(exist_ok=True)
    return folder / "emulator"


@pytest.fixture(scope="session")
def rooms(programs):
    return EmulatedOps(compile_rooms(programs, *LIBRARY))


@pytest.fixture
def emulated(rooms, monkeypatch):
    """oodkern.ops computes with the kernels of csrc/cuda in the emulator."""
    rooms.set()
    rooms.launched()
    rooms.take_over(monkeypatch.setattr)
    return rooms
