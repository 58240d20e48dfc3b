from __future__ import annotations

import platform
import shutil

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder in which the emulator's programs are compiled, each once."""
    if platform.system() != "Linux" or not shutil.which("g++"):
        pytest.skip("the emulator of CUDA kernels needs Linux and g++")
    return tmp_path_factory.mktemp("emulator")
