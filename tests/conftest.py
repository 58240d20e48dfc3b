import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose kernels run on the CPU then
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def pytest_addoption(parser):
    parser.addoption("--second-python", help="an interpreter with another PyTorch, to load the built library under")
    parser.addoption("--triton36", help="a folder with Triton 3.6, to compile the kernels with as well")
    parser.addoption("--triton39", help="a folder with Triton 3.9, likewise")
    parser.addoption("--real-data", help="a folder of real data sets: fashion_mnist, mnist, emnist_letters, unpack.py")


def pytest_collection_modifyitems(items):
    # Files with slow tests first: one that begins last leaves the other processes of `-n` with nothing to do.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def real_data(pytestconfig) -> Path:
    folder = pytestconfig.getoption("--real-data")
    if not folder:
        pytest.skip("real data sets need --real-data=FOLDER")
    return Path(folder)
