"""Builds the native code: writes a ninja file, runs it, and puts the libraries into the package.

Three outputs, all beside the Python sources:

    _cpu.so     schemas and CPU kernels, through the LibTorch stable ABI: no Python, any PyTorch >= 2.10
    _cuda.so    CUDA kernels, likewise, where there is a CUDA compiler that fits the PyTorch
    _build.*.so a pybind11 module that tells what was built

PyTorch is never imported and never linked by path: only its headers and library names are used, so a build
costs no import and its result does not depend on where that PyTorch was (pip's isolated builds put it
somewhere else every time). This is also what makes an unchanged rebuild a no-op: every command line refers
to PyTorch and pybind11 through symbolic links in the build folder.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
PACKAGE = "oodkern"
MODES = ("auto", "cpu", "cuda", "none")
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"

# csrc/cpu/simd/*.cpp is compiled once for each of these; cpu/dispatch.cpp chooses, in this order, best last.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    ]

COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Vectorising needs selections without traps and calls without errno; both are compile-time promises about
# this code alone. -ffast-math is not among them: it would drop NaN and flush the whole process's denormals.
SIMD_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]


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
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
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
    return Torch(folder / "torch", str(values["__version__"]), values.get("cuda"))


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
    wanted = os.environ.get("CXX")
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


def choose_cuda(mode: str, torch_cuda: str | None, nvcc: tuple[str, str] | None, architectures: str, sources: int) -> Cuda:
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


def gencode(architecture: str) -> list[str]:
    """`9.0a` -> compute_90a/sm_90a; `10.0+PTX` adds the PTX for what comes later."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={code}"]


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def link(path: Path, target: Path) -> None:
    if not path.is_symlink() or Path(os.readlink(path)) != target:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def build_info(compiler: str, torch: Torch, cuda: Cuda) -> str:
    def quote(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    values = {
        "COMPILER": quote(compiler),
        "FLAGS": quote(" ".join(COMMON_FLAGS + SIMD_FLAGS)),
        "TORCH_VERSION": quote(torch.version),
        "INSTRUCTION_SETS": ", ".join(map(quote, INSTRUCTION_SETS)),
        "CUDA_VERSION": quote(cuda.version) if cuda.version else "pybind11::none()",
        "CUDA_ARCHITECTURES": ", ".join(map(quote, cuda.architectures)),
        "CUDA_REASON": quote(cuda.reason),
    }
    return "#pragma once\n" + "".join(f"#define OODKERN_{name} {value}\n" for name, value in values.items())


def ninja_file(compiler: list[str], cuda: Cuda, python_module: str) -> str:
    """The whole build as text. Paths are relative to the build folder, or system-wide."""
    csrc = os.path.relpath(SOURCES, build_folder())
    python = sysconfig.get_path("include")
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]
    if len(INSTRUCTION_SETS) > 1:
        defines.append("-DOODKERN_X86_64")
    # -isystem keeps the headers of PyTorch and Python out of the dependency files: pip gives them new dates.
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(COMMON_FLAGS)}",
        f"torch = -isystem deps/torch/include {shlex.join(defines)}",
        # --no-as-needed: PyTorch is loaded with local symbols, so the libraries must be named even where the
        # linker thinks that they are not needed.
        "libraries = -Ldeps/torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu",
        "rule compile\n  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx -shared $in -o $out $libraries",
        "rule link_alone\n  command = $cxx -shared $in -o $out",
    ]
    objects = []

    def compile_one(source: Path, name: str, extra: str, rule: str = "compile") -> str:
        relative = os.path.join(csrc, source.relative_to(SOURCES))
        lines.append(f"build {name}.o: {rule} {relative}\n  extra = {extra}")
        return f"{name}.o"

    for source in [SOURCES / "schema.cpp", *sorted((SOURCES / "cpu").glob("*.cpp"))]:
        objects.append(compile_one(source, source.stem, "$torch"))
    for source in sorted((SOURCES / "cpu" / "simd").glob("*.cpp")):
        for name, flags in INSTRUCTION_SETS.items():
            extra = shlex.join([*SIMD_FLAGS, *flags, f"-DOODKERN_ISA={name}"])
            objects.append(compile_one(source, f"{source.stem}.{name}", extra))
    lines.append(f"build _cpu.so: link {' '.join(objects)}")

    extra = f"-I. -isystem deps/pybind11 -isystem {python}"
    lines.append(f"build {python_module}: link_alone {compile_one(SOURCES / 'build_info.cpp', 'build_info', extra)}")
    targets = ["_cpu.so", python_module]

    if cuda.nvcc:
        codes = [flag for architecture in cuda.architectures for flag in gencode(architecture)]
        lines += [
            f"nvcc = {shlex.quote(cuda.nvcc)}",
            f"cuda_flags = {shlex.join(['-std=c++20', '-O3', '-Xcompiler', '-fPIC,-fvisibility=hidden', *codes])}",
            "rule compile_cuda\n  command = $nvcc -MMD -MF $out.d $cuda_flags $extra -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc",
            "rule link_cuda\n  command = $nvcc -shared -cudart static $in -o $out -Ldeps/torch/lib "
            "-Xlinker --no-as-needed -ltorch -ltorch_cpu",
        ]
        sources = sorted((SOURCES / "cuda").glob("*.cu"))
        compiled = [compile_one(one, f"cuda.{one.stem}", "$torch -DUSE_CUDA", "compile_cuda") for one in sources]
        lines.append(f"build _cuda.so: link_cuda {' '.join(compiled)}")
        targets.append("_cuda.so")
    lines.append(f"default {' '.join(targets)}")
    return "\n".join(lines) + "\n"


def build_folder() -> Path:
    """One folder a Python version and machine, kept between builds."""
    return ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"


def library_names() -> list[str]:
    return ["_cpu.so", "_cuda.so", "_build" + sysconfig.get_config_var("EXT_SUFFIX")]


def run_ninja(folder: Path) -> None:
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BuildError("oodkern is built with ninja, and none is on PATH: run `pip install ninja`.")
    # A compiler takes up to 1 GB for a source that includes PyTorch's headers; two a core keep a small
    # machine out of swap, and MAX_JOBS (the name that PyTorch's own extensions read) overrules.
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([ninja, "-C", str(folder), *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        raise BuildError(f"the native build failed; the compiler said:\n{done.stdout}")


def build(destination: Path) -> list[Path]:
    """Builds what the mode asks for and puts it into `destination`; returns the files that stand there now."""
    mode = build_mode()
    if mode == "none":
        for name in library_names():
            (destination / name).unlink(missing_ok=True)
        print("OODKERN_BUILD=none: no native code; oodkern computes with plain PyTorch.", flush=True)
        return []

    compiler, version = find_compiler()
    torch = find_torch()
    import pybind11  # a build requirement

    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    cuda = choose_cuda(mode, torch.cuda, find_nvcc(), architectures, len(list((SOURCES / "cuda").glob("*.cu"))))
    folder = build_folder()
    python_module = library_names()[2]
    link(folder / "deps" / "torch", torch.path)
    link(folder / "deps" / "pybind11", Path(pybind11.get_include()))
    write_if_changed(folder / "build_info.h", build_info(version, torch, cuda))
    write_if_changed(folder / "build.ninja", ninja_file(compiler, cuda, python_module))
    run_ninja(folder)

    destination.mkdir(parents=True, exist_ok=True)
    placed = []
    for name in library_names():
        made, placed_at = folder / name, destination / name
        if name == "_cuda.so" and not cuda.nvcc:
            placed_at.unlink(missing_ok=True)
            continue
        # Renamed into place: a process that has the old library mapped keeps it.
        if not placed_at.is_file() or placed_at.read_bytes() != made.read_bytes():
            temporary = placed_at.with_name(placed_at.name + ".tmp")
            shutil.copy2(made, temporary)
            os.replace(temporary, placed_at)
        placed.append(placed_at)
    return placed
