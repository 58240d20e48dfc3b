"""Compiles the emulator's programs: as libraries for ctypes, or as programs under the sanitizers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "csrc"))

from toolchain import find_compiler  # noqa: E402

FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
SANITIZERS = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


def compile_one(name: str, folder: Path, *flags: str) -> Path:
    """`name`.cpp with `flags`, made once in `folder`."""
    made = folder / "-".join([name, *(flag.strip("-=") for flag in flags)]).replace("/", "_")
    if not made.exists():
        command = [*find_compiler()[0], *FLAGS, *flags, str(HERE / f"{name}.cpp"), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return made


def library(name: str, folder: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compile_one(name, folder, "-O1", "-shared", "-fPIC")))
    loaded.launched_kernels.restype = ctypes.c_char_p
    return loaded


def sanitized(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program under AddressSanitizer and UndefinedBehaviorSanitizer.

    Leaks are not looked for: threads that are left at an error hold memory.
    """
    program = compile_one(name, folder, *SANITIZERS)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True)
