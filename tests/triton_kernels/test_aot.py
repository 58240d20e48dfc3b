from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_every_kernel import kernels

from oodkern.triton_kernels.configs import TABLE

AOT = Path(__file__).with_name("aot.py")


def compiled(root: Path, architectures: Sequence[str], first_on_path: str = "") -> list[dict]:
    """What aot.py reports, from a process in which nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (first_on_path, str(root))))
    result = subprocess.run([sys.executable, str(AOT), *architectures], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def check(root: Path, architectures: Sequence[str], first_on_path: str = "") -> None:
    reports = compiled(root, architectures, first_on_path)
    rows = {tuple(row) for row in reports.pop(0)["rows"]}
    assert rows == set(TABLE), "cases use other rows of the table of tiles than there are"
    for arch in architectures:
        assert {report["kernel"] for report in reports if report["arch"] == arch} == kernels(root)
    faults = [json.dumps(report) for report in reports if report["faults"]]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_kernels_compile_for_every_architecture(root):
    check(root, ("sm_80", "sm_90", "sm_100"))


# Not all three, for a minute each: the installed Triton compiles for every architecture, above.
@pytest.mark.slow
@pytest.mark.parametrize(("option", "architectures"), [("--triton36", ("sm_90",)), ("--triton39", ("sm_90", "sm_100"))])
def test_kernels_compile_with_the_tritons_of_the_tiles(root, pytestconfig, option, architectures):
    folder = pytestconfig.getoption(option)
    if not folder:
        pytest.skip(f"needs {option}=FOLDER")
    check(root, architectures, folder)
