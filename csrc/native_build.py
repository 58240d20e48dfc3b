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

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from toolchain import (
    BuildError,
    Cuda,
    Torch,
    build_mode,
    choose_cuda,
    cuda_architectures,
    find_compiler,
    find_nvcc,
    find_torch,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
STABLE_ABI = "0x020a000000000000"  # PyTorch 2.10

# csrc/cpu/simd/*.cpp is compiled once for each of these; cpu/dispatch.cpp chooses, in this order, best last.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
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


def ninja_file(compiler: list[str], cuda: Cuda, python_module: str, made_with: str = "") -> str:
    """The whole build as text. Paths are relative to the build folder, or system-wide.

    `made_with` names the versions of compiler and PyTorch, whose files ninja does not watch: another one rebuilds, and
    another CUDA what nvcc compiles.
    """
    csrc = os.path.relpath(SOURCES, build_folder())
    python = sysconfig.get_path("include")
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DTORCH_STABLE_ONLY"]

    def fingerprint(words: str) -> str:
        return f"-DOODKERN_MADE_WITH={zlib.crc32(words.encode()):#x}"

    if len(INSTRUCTION_SETS) > 1:
        defines.append("-DOODKERN_X86_64")
    # -isystem keeps the headers of PyTorch and Python out of the dependency files: pip gives them new dates.
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join([*COMMON_FLAGS, fingerprint(made_with)])}",
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
        flags = [
            "-std=c++20",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            fingerprint(f"{made_with}; {cuda.version}"),
        ]
        flags += [flag for architecture in cuda.architectures for flag in gencode(architecture)]
        lines += [
            f"nvcc = {shlex.quote(cuda.nvcc)}",
            f"cuda_flags = {shlex.join(flags)}",
            # What ptxas says of each kernel (registers, stack, spills) is kept beside the object; tests read it.
            "rule compile_cuda\n  command = $nvcc -MMD -MF $out.d $cuda_flags -Xptxas -v $extra -c $in -o $out "
            "2> $out.log || { cat $out.log; exit 1; }; grep -A 3 warning $out.log || true\n"
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
    # An environment that is used without being activated has its ninja beside its Python.
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise BuildError("oodkern is built with ninja, and there is none: run `pip install ninja`.")
    # ninja takes about one job a core; MAX_JOBS is the name that PyTorch's own extensions read.
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run(
        [ninja, "-C", str(folder), *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
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

    cuda = choose_cuda(mode, torch.cuda, find_nvcc(), cuda_architectures(), len(list((SOURCES / "cuda").glob("*.cu"))))
    folder = build_folder()
    python_module = library_names()[2]
    link(folder / "deps" / "torch", torch.path)
    link(folder / "deps" / "pybind11", Path(pybind11.get_include()))
    write_if_changed(folder / "build_info.h", build_info(version, torch, cuda))
    made_with = f"{version}; {torch.version}"
    write_if_changed(folder / "build.ninja", ninja_file(compiler, cuda, python_module, made_with))
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
