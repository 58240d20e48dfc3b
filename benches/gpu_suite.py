"""All that is to be done on a GPU that is rented for minutes: `python benches/gpu_suite.py --out DIR --minutes 8`.

Builds the package, runs the tests that need a GPU and compute-sanitizer, then times the cases of the lists GPU of
benches/bench_*.py, the important first, until the minutes are over. DIR/DATE-COMMIT.json grows by each case; it is what
`pytest benches --benchmark-only --save` stores, for benches/results/MACHINE.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def python(words: str) -> list[str]:
    return [sys.executable, *words.split()]


BUILD = python("-m pip install -e . --no-build-isolation --no-deps")
DOCTOR = python("-m oodkern doctor")
# Compute-sanitizer has a part of the minutes for itself.
TESTS = python(
    "-m pytest tests -m gpu -v --tb=short --continue-on-collection-errors -p no:cacheprovider "
    "--ignore=tests/cuda/test_sanitizer_gpu.py"
)
TESTS_SHARE = 0.25  # of the minutes
SANITIZER_SHARE = 0.08  # for each tool
SANITIZER_TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit code of compute-sanitizer where it found something
TEST_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$", re.MULTILINE)
UNREAD_LINE = re.compile(r"^ERROR ([^\s:]+\.py)(?: - .*)?$", re.MULTILINE)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="gpu_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--out", metavar="DIR", required=True, help="the folder of logs and results; made where missing")
    top.add_argument("--minutes", type=float, default=8.0, help="that all of it may take (default 8)")
    top.add_argument("--no-build", action="store_true", help="the package is built")
    top.add_argument("--no-tests", action="store_true", help="neither tests nor compute-sanitizer")
    top.add_argument("--rooms", metavar="A,B", help="time the cases of these rooms alone")
    top.add_argument("--commit", metavar="ID", help="of the sources, where they are no git checkout")
    top.add_argument(
        "--benches", metavar="FOLDER", default=ROOT / "benches", help="that has bench_*.py (default: here)"
    )
    top.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU: the CPU, tiny sizes, nothing compiled; commands are printed and not run",
    )
    return top


def parse(arguments: list[str] | None) -> argparse.Namespace:
    top = parser()
    options = top.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        top.error(f"--minutes: expected a number above 0, got {options.minutes}")
    options.out, options.benches = Path(options.out).resolve(), Path(options.benches).resolve()
    if not any(options.benches.glob("bench_*.py")):
        top.error(f"--benches: expected a folder with bench_*.py, got {options.benches}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        top.error(f"--out: {options.out} is not to be written: {error.strerror}")
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            top.error("no CUDA device here; --dry-run needs none")
    return options


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], log: Path, seconds: float, more: dict[str, str] | None = None) -> int | None:
    """The exit code; None where it took longer: then it is stopped, and what it started."""
    say(f"$ {shlex.join(command)}  > {log.name}, {seconds:.0f} s at most")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (more or {})
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_tests(log: Path, seconds: float) -> dict[str, Any]:
    """Counts of results, and the tests that failed, files that cannot be read among them."""
    code = run(TESTS, log, seconds)
    text = log.read_text(errors="replace")
    results = TEST_LINE.findall(text)
    counts = Counter(word.lower() for _, word in results)
    failed = UNREAD_LINE.findall(text) + [name for name, word in results if word in ("FAILED", "ERROR", "XPASS")]
    for name in failed:
        say(f"  failed: {name}")
    if code is None:
        say(f"  stopped after {seconds:.0f} s, at: {tail(log, 1)}")
    elif code not in (0, 1) or not results:
        say(f"  pytest ended with exit code {code}:\n{tail(log, 15)}")
    return {**counts, "failures": failed, "exit_code": code}


def sanitizer() -> str | None:
    """compute-sanitizer: in PATH, of CUDA_HOME, beside nvcc, where CUDA is installed by itself."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*(f"{home}/bin" for home in homes), *([os.path.dirname(nvcc)] if nvcc else []), "/usr/local/cuda/bin"]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_command(program: str, tool: str, benches: Path) -> list[str]:
    """Of the kernels of csrc/cuda, which are in the namespace oodkern, and of those of Triton, whose names end alike.

    What PyTorch asks the driver for and does not get is no error of a kernel.
    """
    return [
        *(program, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"),
        *("--kernel-name", "kernel_substring=oodkern", "--kernel-name", "kernel_substring=_kernel"),
        *(sys.executable, str(ROOT / "benches" / "gpu_cases.py"), str(benches)),
    ]


def run_sanitizer(program: str, tool: str, benches: Path, log: Path, seconds: float) -> str:
    # Uncached: each tensor is an allocation of its own, whose ends memcheck knows.
    code = run(sanitizer_command(program, tool, benches), log, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    text = log.read_text(errors="replace")
    if re.search(r"^=+ (Invalid|Misaligned|Error: )", text, re.MULTILINE):
        code = FOUND
    words = {0: "found nothing", 1: "cases failed", FOUND: "FOUND ERRORS", None: f"stopped after {seconds:.0f} s"}
    summaries = re.findall(r"^=+ (.*SUMMARY.*)$", text, re.MULTILINE)
    computed = len(re.findall(r"^computed: ", text, re.MULTILINE))
    said = "; ".join([words.get(code, f"exit code {code}"), f"{computed} cases computed", *summaries[-1:]])
    for line in re.findall(r"^failed: .*$", text, re.MULTILINE):
        say(f"  {line}")
    say(f"  {tool}: {said}")
    return said


def build(options: argparse.Namespace, left: float) -> None:
    """Ends the program where the package cannot be built: there is nothing to measure."""
    log = options.out / "build.log"
    started = time.monotonic()
    code = run(BUILD, log, left)
    if code != 0:
        raise SystemExit(f"{tail(log, 30)}\nerror: the build {'took too long' if code is None else 'failed'}: {log}")
    say(f"  built in {time.monotonic() - started:.0f} s")


def before_times(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Build, tests and compute-sanitizer: what there is to tell of these."""
    told: dict[str, Any] = {"tests": {}, "sanitizer": {}}
    program = sanitizer()
    if options.dry_run:
        shown = [sanitizer_command(program or "compute-sanitizer", tool, options.benches) for tool in SANITIZER_TOOLS]
        for command in (BUILD, DOCTOR, TESTS, *shown):
            say(f"would run: {shlex.join(command)}")
        return told
    if not options.no_build:
        build(options, until - time.monotonic())
    run(DOCTOR, options.out / "doctor.log", 120)
    say(tail(options.out / "doctor.log", 60))
    if options.no_tests:
        return told
    told["tests"] = run_tests(options.out / "tests.log", TESTS_SHARE * 60 * options.minutes)
    if program is None:
        say("compute-sanitizer is not there: neither in PATH, CUDA_HOME/bin nor beside nvcc")
        return told
    for tool in SANITIZER_TOOLS:
        seconds = SANITIZER_SHARE * 60 * options.minutes
        log = options.out / f"{tool}.log"
        told["sanitizer"][tool] = run_sanitizer(program, tool, options.benches, log, seconds)
    return told


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    options = parse(arguments)
    until = begun + 60 * options.minutes
    os.chdir(ROOT)
    told = before_times(options, until)

    import gpu_cases  # not before the library that these load is built
    import gpu_kept

    cases, unread = gpu_cases.read_cases(options.benches)
    if options.rooms:
        cases = [(module, case) for module, case in cases if case.room in options.rooms.split(",")]
    kept = gpu_kept.Kept(options.out, options.commit, unread, told)
    gpu_cases.measure_all(cases, kept, "cpu" if options.dry_run else "cuda", options.dry_run, until, say)
    suite, tests = kept.suite, told["tests"]
    found = ", ".join(f"{tool} {said}" for tool, said in told["sanitizer"].items())
    say("\n" + "\n".join(gpu_kept.table(kept.path)))
    say(
        f"\ncases: {suite['measured']} measured ({len(suite['broken'])} wrong), {len(suite['failed'])} failed, "
        f"{len(suite['left_out'])} left out; tests: {tests.get('passed', 0)} passed, "
        f"{len(tests.get('failures', ()))} failed; sanitizer: {found or 'not run'}"
    )
    say(f"kept in {kept.path}")
    wrong = suite["failed"] or suite["broken"] or tests.get("exit_code") or "FOUND" in found
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
