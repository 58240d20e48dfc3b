"""Compiles kernels for the emulator: its own programs, and csrc/cuda/*.cu as one library of raw ops."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

from native_build import STABLE_ABI  # noqa: E402
from toolchain import find_compiler, find_torch  # noqa: E402

FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
LIBRARY = ["-O1", "-shared", "-fPIC"]
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], env=os.environ | environment, capture_output=True, text=True)


def made_by(*command: object) -> None:
    done = run(*find_compiler()[0], *command)
    assert done.returncode == 0, done.stderr[:20_000]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Among the processes that compile into `folder`."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_one(name: str, folder: Path, *flags: str) -> Path:
    """`name`.cpp with `flags`, made once in `folder`."""
    made = folder / "-".join([name, *(flag.strip("-=") for flag in flags)]).replace("/", "_")
    with alone(folder):
        if not made.exists():
            made_by(*FLAGS, *flags, HERE / f"{name}.cpp", "-o", made)
    return made


def compile_rooms(folder: Path, *flags: str) -> Path:
    """The kernels and the host code of every room in csrc/cuda, made once in `folder`."""
    made = folder / "-".join(["rooms", *(flag.strip("-=") for flag in flags)])
    torch = find_torch().path
    headers = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", torch / "include"]
    libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    flags = (*flags, "-fPIC", "-fvisibility=hidden", *FLAGS, "-DOODKERN_EMULATED")

    def compile_source(source: Path) -> Path:
        out = folder / f"{made.name}-{source.stem}.o"
        made_by(*flags, *headers, "-c", "-x", "c++", source, "-o", out)
        return out

    sources = [HERE / "emulated.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with alone(folder), ThreadPoolExecutor(os.cpu_count()) as pool:
        if not made.exists():
            made_by(*flags, "-shared", *pool.map(compile_source, sources), "-o", made, *libraries)
    return made


def sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program under AddressSanitizer and UndefinedBehaviorSanitizer.

    Leaks are not looked for: threads that are left at an error hold memory.
    """
    return run(program, *arguments, ASAN_OPTIONS="detect_leaks=0")


def sanitized_python(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same for what a library does that Python loads: AddressSanitizer has to be in the process first."""
    sanitizer = run(*find_compiler()[0], "-print-file-name=libasan.so").stdout.strip()
    return run(sys.executable, script, *arguments, ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD=sanitizer)
