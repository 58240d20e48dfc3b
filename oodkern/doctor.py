"""What was built, who computes what, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import oodkern
from oodkern import _native
from oodkern.backends import KERNELS, arch_of, available_backends, choose_backend

NEEDED = ("numpy", "scikit-learn", "scipy", "omegaconf", "tqdm", "matplotlib", "pillow")
EXTRAS = {
    "vision": ("torchvision", "timm", "webdataset"),
    "bench": ("pytest_benchmark", "liger_kernel"),
    "test": ("pytest", "hypothesis"),
}


def report() -> str:
    lines = [f"oodkern {oodkern.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}", ""]
    lines += ["native code", *indent(native_code()), ""]
    lines += ["who computes", *indent(backends()), ""]
    lines += ["needed by the trainer", *indent(needed()), ""]
    lines += ["extras", *indent(extras())]
    return "\n".join(lines)


def indent(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def native_code() -> list[str]:
    build = _native.build
    lines = []
    if build is None:
        lines.append(f"what was built is not known ({_native.no_build}): {_native.HOW_TO_BUILD.split(';')[0]}")
    else:
        lines += [
            f"built by {build.compiler} against the headers of PyTorch {build.torch_version}",
            f"flags {build.flags}",
        ]
    cpu = _native.missing["cpu"]
    sets = _native.instruction_sets()
    lines.append(
        f"CPU: missing, {cpu}" if cpu else f"CPU: {', '.join(sets)}; in use {_native.instruction_set_in_use()}"
    )
    cuda = _native.missing["cuda"]
    if cuda:
        lines.append(f"CUDA: none, {cuda}")
    else:
        lines.append(
            f"CUDA: {build.cuda_version} for {', '.join(build.cuda_architectures)}" if build else "CUDA: loaded"
        )
    return lines


def backends() -> list[str]:
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    lines = []
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        arch, available = arch_of(device), available_backends(device.type)
        for room in KERNELS:
            chosen = choose_backend(room, 65536, 512, 1000, torch.float32, arch, available)
            lines.append(f"{room} on {arch}{name}: {chosen}")
    if len(devices) == 1:
        lines.append("no CUDA device" if torch.version.cuda else "no CUDA device: this PyTorch is CPU-only")
    return lines


def needed() -> list[str]:
    found, missing = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    lines = [", ".join(found)]
    if missing:
        lines.append(f"missing {', '.join(missing)}: pip install {' '.join(missing)}")
    return lines


def extras() -> list[str]:
    lines = []
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        state = f"missing {', '.join(missing)}: pip install 'oodkern[{extra}]'" if missing else "complete"
        lines.append(f"{extra}: {state}")
    return lines
