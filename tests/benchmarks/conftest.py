import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benches are modules of the checkout, not of a package

from stored_runs import README, run_of

from benches.report import main


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    (root / "README.md").write_text(README)
    run_of(root)
    assert main([], root) == 0
    return root
