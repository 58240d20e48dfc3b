"""benches/gpu_suite.py, which is for a GPU that is rented for minutes, as far as it goes without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import planted_cases
import pytest
import torch

from oodkern.benchmarks.case import OURS, Contender
from oodkern.benchmarks.measure import first_failure

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches"))

import gpu_suite
from stored import read_run

RIGHT, WRONG = "linear_energy: right", "unheard of: wrong"

PLANTED_TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("value", ["a b", "c"])
def test_fails(value):
    assert value == "c"

def test_skips():
    pytest.skip("for a reason")
"""


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benches")
    shutil.copy(Path(__file__).with_name("planted_cases.py"), folder / "bench_planted.py")
    (folder / "bench_broken.py").write_text("import no_such_module_at_all\n")
    (folder / "bench_without.py").write_text("CASES = []\n")
    return folder


@pytest.fixture
def suite(root, tmp_path):
    """Runs the script."""

    def call(*arguments, script="gpu_suite.py"):
        return subprocess.run(
            [sys.executable, str(root / "benches" / script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SUITE_OUT": str(tmp_path / "out")},
            timeout=120,
        )

    return call


def test_a_dry_run(suite, benches, tmp_path):
    out = tmp_path / "out"
    done = suite("--out", out, "--minutes", 2, "--dry-run", "--benches", benches, "--commit", "abc1234")
    assert done.returncode == 1, done.stderr  # cases failed
    (path,) = out.glob("*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-abc1234\.json", path.name)
    assert not [name for name in os.listdir(out) if name.endswith((".tmp", ".part"))]
    kept = json.loads(path.read_text())

    # The important first; what fails keeps nothing from being measured.
    order = list(dict.fromkeys(one["group"].split(",")[0] for one in kept["benchmarks"]))
    assert order == [RIGHT, "norm: witness", WRONG]
    assert len(kept["benchmarks"]) == 9  # ours, eager, chunked; the third is absent
    assert {name.split(",")[0]: why for name, why in kept["suite"]["failed"].items()} == {
        "bench_broken": "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        "linear_energy: explode": "ValueError: a kernel failed",
        "unheard of: end": "its process ended with exit code 7",
    }
    (wrong,) = kept["suite"]["broken"].items()
    assert wrong[0].startswith(WRONG)
    assert "error 5.0e-01" in wrong[1]

    # It grew case by case.
    (seen,), (failed,) = json.loads((out / "seen.txt").read_text())
    assert seen == [RIGHT] * 3
    assert len(failed) == 2

    read = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "test_gpu[right,backward-N=48-float32-oodkern]" in read.stdout, read.stderr
    run = read_run(path)
    ours = run.groups[0].ours
    assert ours.sizes == {"N": 48}
    assert ours.file == "benches/bench_planted.py"
    assert ours.rounds >= 1
    assert ours.roofline > 0
    assert "no_such_module" in ours.absent["third"]
    assert kept["machine_info"]["commit"] == kept["commit_info"]["id"] == "abc1234"
    assert kept["machine_info"]["device"] == "cpu"

    for said in ("would run: ", "pip install -e .", "oodkern doctor", "-m gpu", "--tool memcheck", "--tool racecheck"):
        assert said in done.stdout
    lines = done.stdout.splitlines()
    (line,) = (one for one in lines if WRONG in one and "WRONG" in one)
    assert float(line.split()[0]) == pytest.approx(run.groups[2].ours.median * 1e3, abs=1e-3)
    assert "failed: unheard of: end, forward, N=1,000,000,000, float32: its process ended with exit code 7" in lines
    assert "cases: 3 measured (1 wrong), 3 failed, 0 left out; tests: 0 passed, 0 failed; sanitizer: not run" in lines


def test_what_does_not_fit_the_minutes_is_left_out_by_name(suite, benches, tmp_path):
    out = tmp_path / "new" / "out"
    for runs in (1, 2):  # the second does not write over the first
        done = suite("--out", out, "--minutes", 1e-6, "--dry-run", "--benches", benches, "--rooms", "norm,unheard of")
        assert len(list(out.glob("*.json"))) == runs
    for path in out.glob("*.json"):
        kept = json.loads(path.read_text())
        assert kept["benchmarks"] == []
        assert len(kept["suite"]["left_out"]) == 3
        for name in kept["suite"]["left_out"]:
            assert f"left out: {name}" in done.stdout.splitlines()
    assert "cases: 0 measured (0 wrong), 1 failed, 3 left out" in done.stdout  # the module that cannot be read


def test_results_of_tests(tmp_path, monkeypatch):
    (tmp_path / "test_planted.py").write_text(PLANTED_TESTS)
    (tmp_path / "test_unread.py").write_text("import no_such_module_at_all")
    words = gpu_suite.TESTS[gpu_suite.TESTS.index("-v") :]
    monkeypatch.setattr(gpu_suite, "TESTS", gpu_suite.python(f"-m pytest {tmp_path} -c /dev/null") + words)
    found = gpu_suite.run_tests(tmp_path / "tests.log", 60)
    assert {key: found[key] for key in ("passed", "failed", "skipped", "exit_code")} == {
        "passed": 2,
        "failed": 1,
        "skipped": 1,
        "exit_code": 1,
    }
    assert [re.split("::|/", name)[-1] for name in found["failures"]] == ["test_unread.py", "test_fails[a b]"]


def test_what_takes_too_long_is_stopped_with_what_it_started(tmp_path):
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '100']).pid); sys.stdout.flush(); input()"
    command = [sys.executable, "-c", f"import time; {script.replace('input()', 'time.sleep(100)')}"]
    assert gpu_suite.run(command, tmp_path / "log", 2) is None
    child = Path("/proc", (tmp_path / "log").read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what it started goes on")


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
for word in "$@"; do echo "word $word"; done
echo "computed: a case"
echo "failed: another: ValueError: no"
{line}
exit {code}
"""


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", 0, "found nothing; 1 cases computed; ERROR SUMMARY: 0 errors"),
        ("echo '========= ERROR SUMMARY: 2 errors'", 9, "FOUND ERRORS; 1 cases computed; ERROR SUMMARY: 2 errors"),
        ("echo '========= Invalid __global__ write of size 4 bytes'; sleep 100", 0, "FOUND ERRORS; 1 cases computed"),
        ("sleep 100", 0, "stopped after 1 s; 1 cases computed"),
    ],
)
def test_what_compute_sanitizer_said(tmp_path, monkeypatch, capsys, line, code, said):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "compute-sanitizer"
    program.write_text(SANITIZER.format(line=line, code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert gpu_suite.sanitizer() == str(program)
    assert gpu_suite.run_sanitizer(str(program), "racecheck", tmp_path, tmp_path / "log", 1) == said
    assert "word racecheck" in (tmp_path / "log").read_text()
    assert "failed: another: ValueError: no" in capsys.readouterr().out


def test_ours_at_tiny_sizes(suite, benches, tmp_path):
    """What compute-sanitizer watches."""
    (tmp_path / "out").mkdir()  # where the witness writes
    lines = (benches / "bench_planted.py").read_text().splitlines(keepends=True)
    (tmp_path / "bench_planted.py").write_text("".join(line for line in lines if 'what="end"' not in line))
    done = suite(tmp_path, script="gpu_cases.py")
    assert done.returncode == 1
    said = done.stdout.splitlines()
    kinds = ["failed: linear_energy: explode", *(f"computed: {name}" for name in (RIGHT, "norm: witness", WRONG))]
    assert [line.split(",")[0] for line in said] == kinds * 2  # at two sizes
    assert said[0].endswith("ValueError: a kernel failed")
    assert [re.search("N=(.*),", line)[1] for line in said[1:4] + said[5:]] == ["48"] * 3 + ["77"] * 3


@pytest.mark.parametrize(
    ("needs", "error", "why"),
    [
        (("liger_kernel",), ValueError("not this size"), "ValueError: not this size"),
        ((), torch.OutOfMemoryError("80 GB"), "OutOfMemoryError: 80 GB"),
        ((), ValueError("not this size"), None),
    ],
)
def test_a_rival_that_fails_is_absent(needs, error, why):
    """On a GPU: a third party's for any reason, eager for want of memory; anything else is the case's failure."""

    def fail():
        raise error

    case = planted_cases.one(room="norm", what="right", N=3)
    case.contenders["rival"] = Contender(fail, needs=needs)
    if why is None:
        with pytest.raises(ValueError, match="not this size"):
            first_failure(case, "rival", fail)
    else:
        assert first_failure(case, "rival", fail) == why
    with pytest.raises(type(error)):
        first_failure(case, OURS, fail)
    assert first_failure(case, OURS, int) is None


def test_help(suite):
    done = suite("--help")
    assert done.returncode == 0
    for option in ("--out", "--minutes", "--no-build", "--no-tests", "--rooms", "--commit", "--dry-run"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "file/below", "--dry-run"), "--out: .*file/below is not to be written: "),
        (("--out", "out", "--minutes", "0", "--dry-run"), "--minutes: expected a number above 0, got 0.0"),
        (("--out", "out", "--minutes", "nan", "--dry-run"), "--minutes: expected a number above 0, got nan"),
        (("--out", "out", "--minutes", "-3", "--dry-run"), "--minutes: expected a number above 0, got -3.0"),
        (("--out", "out", "--benches", "empty", "--dry-run"), "--benches: expected a folder with bench_.*.py, got "),
        (("--dry-run",), "--out"),
    ],
)
def test_wrong_options_end_it_before_any_work(suite, tmp_path, arguments, said):
    (tmp_path / "file").write_text("")
    done = suite(*arguments)
    assert done.returncode == 2
    assert re.search(said, done.stderr), done.stderr
    assert done.stdout == ""
