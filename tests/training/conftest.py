"""Short runs on the embedded digits."""

import pytest

from oodkern.config import load_config
from oodkern.data import DataConfig, build_split

SHORT = ("epochs=2", "pretrain.epochs=2")


@pytest.fixture(scope="session")
def digits():
    return build_split(DataConfig())


@pytest.fixture
def short(tmp_path):
    """A configuration of two and two epochs in a folder of the test's own."""

    def make(*overrides):
        return load_config(None, [f"output={tmp_path}", *SHORT, *overrides])

    return make
