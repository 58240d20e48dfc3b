"""Whole jobs in processes of their own: `pytest benches/bench_jobs.py`.

What `import oodkern` adds to `import torch`, how long `oodkern train` of nothing but defaults takes, how long an
installation from source.
"""

import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runner import CLOCK, replay

from oodkern.benchmarks.case import OURS
from oodkern.benchmarks.timing import Times

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "csrc"))
from toolchain import BuildError, find_compiler  # noqa: E402

TURNS = 3
IMPORT_LIMIT = 0.3  # seconds
IMPORTS = {OURS: ("torch, numpy", "oodkern"), "import torch": ("time", "torch")}
PROGRAM = """
import {before}
import time
started = time.perf_counter()
import {what}
print(time.perf_counter() - started)
"""
pytestmark = pytest.mark.benchmark(timer=CLOCK)


def hand(benchmark, title, contender, seconds, **found):
    benchmark.group = f"jobs: {title}"
    benchmark.extra_info.update(room="jobs", case=title, contender=contender, **found)
    replay(benchmark, Times(tuple(seconds)))


def seconds_of_import(before, what):
    program = PROGRAM.format(before=before, what=what)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


@functools.cache
def seconds_of_imports(turns):
    found = {name: [] for name in IMPORTS}
    for turn in range(turns + 1):  # byte code is compiled in the first
        for name, words in IMPORTS.items():
            took = seconds_of_import(*words)
            if turn:
                found[name].append(took)
    return found


@pytest.mark.parametrize("name", IMPORTS)
def test_import(name, benchmark, request):
    seconds = seconds_of_imports(1 if request.config.getoption("--smoke") else TURNS)[name]
    limit = {"limit_seconds": IMPORT_LIMIT} if name == OURS else {}
    hand(benchmark, "import, beside import torch", name, seconds, **limit)
    if name == OURS:
        assert Times(tuple(seconds)).median < IMPORT_LIMIT


@pytest.fixture
def no_smoke(request):
    if request.config.getoption("--smoke"):
        pytest.skip("--smoke: takes up to a minute")


def peak_of(process, found):
    """Polls the most that a process held at once, until it is over."""
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                found.extend(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
        except OSError:
            return
        time.sleep(0.05)


def test_train(benchmark, no_smoke, tmp_path):
    """From the start of a fresh process to the first line of the table, and to its end, of the embedded digits."""
    started, lines, peaks = time.perf_counter(), {}, []
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "oodkern", "train", "--quiet"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    watch = threading.Thread(target=peak_of, args=(process, peaks))
    watch.start()
    for line in process.stdout:
        lines.setdefault(line.partition(" ")[0], time.perf_counter() - started)
    process.wait()
    took = time.perf_counter() - started
    watch.join()
    assert process.returncode == 0
    title = "oodkern train, digits, all defaults"
    found = {"to_table_seconds": lines["model"], "peak_bytes": max(peaks, default=None)}
    hand(benchmark, title, OURS, [took], threads=torch.get_num_threads(), **found)


def export(folder):
    """The tracked files as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it was removed since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_install(benchmark, no_smoke, tmp_path):
    """pip builds the CPU kernels of a clean copy, against the PyTorch that is there."""
    try:
        _, compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    source, target = tmp_path / "source", tmp_path / "target"
    export(source)
    call = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(target), "."]
    started = time.perf_counter()
    done = subprocess.run(
        call, cwd=source, env={**os.environ, "OODKERN_BUILD": "cpu"}, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    libraries = sorted(path.name for path in target.rglob("*.so"))
    assert libraries, "nothing was compiled"
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    title = "pip install of the sources, CPU kernels"
    hand(benchmark, title, OURS, [took], cores=os.cpu_count(), compiler=compiler, installed_bytes=size)
