"""What is told of the machine."""

import json
import subprocess

import pytest
import torch

from oodkern.benchmarks import machine as module
from oodkern.benchmarks.machine import Ceilings, commit, machine, machine_name


def test_names_for_folders():
    cpu = {"device": "cpu", "cpu": "AMD EPYC 7B13 (64-Core)", "cores": 2, "gpu": None}
    assert machine_name(cpu) == "amd-epyc-7b13-64-core-2-cores"
    assert machine_name({**cpu, "device": "cuda", "gpu": "NVIDIA H200"}) == "nvidia-h200"


def test_this_machine():
    found = machine(torch.device("cpu"))
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert "gpu" not in found
    assert json.loads(json.dumps(found)) == found
    assert machine_name(found).endswith(f"{found['cores']}-cores")


def git(folder, *words):
    call = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The package lies in a folder of its own."""
    folder = tmp_path / "oodkern" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "machine.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "__file__", str(folder / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_the_commit_of_a_checkout(installed):
    assert commit() is None, "no checkout"
    git(installed, "init", "-q")
    (installed / "own.py").write_text("")
    git(installed, "add", "own.py")
    git(installed, "commit", "-q", "-m", "somebody else's project, with the package installed inside it")
    assert commit() is None
    git(installed, "add", "oodkern")
    git(installed, "commit", "-q", "-m", "ours")
    short = git(installed, "rev-parse", "--short", "HEAD")
    assert commit() == short
    (installed / "own.py").write_text("changed")
    assert commit() == short
    (installed / "oodkern" / "benchmarks" / "machine.py").write_text("x = 2\n")
    assert commit() == f"{short}-dirty"


def test_without_git(installed, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_the_least_time_is_that_of_the_longer_one():
    found = Ceilings(copy=100.0, products={"float32": 1_000.0, "bfloat16": 4_000.0})
    assert found.seconds(flops=2_000, bytes=50, dtype="float32") == 2.0
    assert found.seconds(flops=2_000, bytes=50, dtype="bfloat16") == 0.5
    assert found.seconds(flops=0, bytes=300, dtype="float32") == 3.0


def test_products_that_were_not_measured():
    found = Ceilings(copy=100.0, products={"float32": 1_000.0, "bfloat16": 4_000.0})
    assert found.seconds(flops=0, bytes=300, dtype="float16") == 3.0
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, got 'float16'"):
        found.seconds(flops=1, bytes=300, dtype="float16")
