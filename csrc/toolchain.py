"""What a build finds: the mode, the PyTorch, the compilers. Nothing here imports PyTorch."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"  # later GPUs compile the PTX when they first load it


class BuildError(Exception):
    """A build that cannot go on, with a message for the person who asked for it."""


@dataclass(frozen=True)
class Torch:
    path: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler to use, or the reason why there is none."""

    nvcc: str | None = None
    version: str | None = None
    architectures: tuple[str, ...] = ()
    reason: str = ""


def build_mode() -> str:
    mode = os.environ.get("OODKERN_BUILD", "auto").strip().lower() or "auto"
    if mode not in MODES:
        raise BuildError(f"OODKERN_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    return mode


def target_site_packages() -> list[Path]:
    """Where the environment that is installed into keeps its packages.

    Inside pip's isolated build sys.path shows the build environment alone, but sysconfig still names the
    environment of the interpreter.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if settings.is_file() and re.search(r"include-system-site-packages\s*=\s*true", settings.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    elif sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())  # site.ENABLE_USER_SITE is off inside pip's isolated build
    return [Path(folder) for folder in dict.fromkeys(folders)]


def torch_in(folder: Path) -> Torch | None:
    described = folder / "torch" / "version.py"
    if not (described.is_file() and (folder / "torch" / "include").is_dir()):
        return None
    values = {}
    for statement in ast.parse(described.read_text()).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(target, ast.Name) and isinstance(statement.value, ast.Constant):
                values[target.id] = statement.value.value
    return Torch(folder / "torch", str(values["__version__"]), str(cuda) if (cuda := values.get("cuda")) else None)


def target_torch() -> Torch | None:
    """The PyTorch of the environment that is installed into, without importing it."""
    return next(filter(None, map(torch_in, target_site_packages())), None)


def find_torch() -> Torch:
    torch = target_torch()
    if torch is None:
        spec = importlib.util.find_spec("torch")
        torch = torch_in(Path(spec.origin).parent.parent) if spec and spec.origin else None
    if torch is None:
        raise BuildError(
            "oodkern is built against the headers of PyTorch >= 2.10, and none is installed here: run "
            "`pip install torch` first, or leave out --no-build-isolation."
        )
    if tuple(map(int, torch.version.split(".")[:2])) < (2, 10):
        raise BuildError(f"oodkern needs PyTorch >= 2.10, found {torch.version} in {torch.path}")
    return torch


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and the first line of what it says of itself."""
    wanted = os.environ.get("CXX", "").strip()
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            version = subprocess.run([*command, "--version"], capture_output=True, text=True)
            if version.returncode == 0:
                return command, version.stdout.splitlines()[0]
    raise BuildError(
        f"oodkern needs a C++20 compiler (GCC >= 11 or Clang >= 14) and found none (looked for {', '.join(names)}).\n"
        "Install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; conda: "
        "`conda install gxx`), or name it in CXX.\nTo install without native code, which computes with plain "
        "PyTorch and is slower: OODKERN_BUILD=none pip install -e ."
    )


def find_nvcc() -> tuple[str, str] | None:
    """The CUDA compiler and its version. (torch.utils.cpp_extension knows none under a CPU-only PyTorch.)"""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.path.join(home, "bin", "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            if release := re.search(r"release (\d+\.\d+)", said):
                return path, release.group(1)
    return None


def cuda_architectures() -> str:
    """The CUDA architectures to build for, in the notation of PyTorch's own extensions."""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES


def choose_cuda(
    mode: str, torch_cuda: str | None, nvcc: tuple[str, str] | None, architectures: str, sources: int
) -> Cuda:
    """Whether the CUDA library is built. Mode "cuda" insists: what would be a reason is then an error."""
    reason = ""
    if mode == "cpu":
        reason = "OODKERN_BUILD=cpu"
    elif not sources:
        reason = "this version has no CUDA sources"
    elif torch_cuda is None and mode != "cuda":
        reason = "the PyTorch built against is CPU-only"
    elif nvcc is None:
        reason = "no CUDA compiler (nvcc) on PATH or under CUDA_HOME"
    elif torch_cuda and torch_cuda.split(".")[0] != nvcc[1].split(".")[0]:
        reason = f"nvcc is of CUDA {nvcc[1]} and PyTorch of CUDA {torch_cuda}: the major versions must agree"
    if reason and mode == "cuda":
        raise BuildError(f"OODKERN_BUILD=cuda: {reason}")
    if reason or nvcc is None:
        return Cuda(reason=reason)
    return Cuda(nvcc[0], nvcc[1], tuple(filter(None, re.split(r"[;\s]+", architectures))))
