"""The decisions of the build, as functions of what it finds."""

import re
from pathlib import Path

import backend
import native_build
import pytest
import toolchain
import torch
from native_build import gencode
from toolchain import BuildError, Torch, choose_cuda

NVCC = ("/usr/bin/nvcc", "13.0")


class TestCuda:
    def test_builds_where_everything_fits(self):
        cuda = choose_cuda("auto", "13.2", NVCC, "8.0;9.0a 10.0+PTX", sources=3)
        assert cuda == toolchain.Cuda("/usr/bin/nvcc", "13.0", ("8.0", "9.0a", "10.0+PTX"))

    @pytest.mark.parametrize(
        ("mode", "torch_cuda", "nvcc", "sources", "reason"),
        [
            ("cpu", "13.0", NVCC, 3, "OODKERN_BUILD=cpu"),
            ("auto", None, NVCC, 3, "the PyTorch built against is CPU-only"),
            ("auto", "13.0", None, 3, "no CUDA compiler"),
            ("auto", "12.8", NVCC, 3, "nvcc is of CUDA 13.0 and PyTorch of CUDA 12.8"),
            ("auto", "13.0", NVCC, 0, "no CUDA sources"),
        ],
    )
    def test_says_why_not(self, mode, torch_cuda, nvcc, sources, reason):
        cuda = choose_cuda(mode, torch_cuda, nvcc, "9.0a", sources)
        assert cuda.nvcc is None
        assert reason in cuda.reason

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "sources"), [("13.0", None, 3), ("12.8", NVCC, 3), ("13.0", NVCC, 0)]
    )
    def test_insisting_makes_the_reason_an_error(self, torch_cuda, nvcc, sources):
        with pytest.raises(BuildError, match="OODKERN_BUILD=cuda: "):
            choose_cuda("cuda", torch_cuda, nvcc, "9.0a", sources)

    def test_insisting_builds_beside_a_cpu_torch(self):
        assert choose_cuda("cuda", None, NVCC, "9.0a", sources=3).nvcc

    def test_gencode(self):
        assert gencode("9.0a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
        assert gencode("10.0+PTX") == ["-gencode", "arch=compute_100,code=[sm_100,compute_100]"]

    def test_ninja_file_with_cuda(self, monkeypatch, tmp_path):
        """The lines that only a CUDA build has, from a source folder that has a kernel."""
        (tmp_path / "cuda").mkdir()
        for name in ("schema.cpp", "build_info.cpp", "cuda/energy.cu"):
            (tmp_path / name).touch()
        monkeypatch.setattr(native_build, "SOURCES", tmp_path)
        text = native_build.ninja_file(["g++"], toolchain.Cuda("/opt/nvcc", "13.0", ("8.0", "9.0a")), "_build.so")
        assert "nvcc = /opt/nvcc" in text
        assert "code=sm_80 -gencode arch=compute_90a,code=sm_90a" in text
        assert "build _cuda.so: link_cuda cuda.energy.o" in text
        assert text.rstrip().endswith("default _cpu.so _build.so _cuda.so")


class TestTorch:
    @staticmethod
    def fake(folder: Path, version: str = "2.13.0+cpu", cuda: str | None = None) -> Path:
        (folder / "torch" / "include").mkdir(parents=True)
        (folder / "torch" / "version.py").write_text(
            f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\ndef f(): pass\n"
        )
        return folder

    def test_is_read_and_not_imported(self, tmp_path):
        assert toolchain.torch_in(self.fake(tmp_path)) == Torch(tmp_path / "torch", "2.13.0+cpu", None)
        assert toolchain.torch_in(tmp_path / "nowhere") is None

    def test_the_installed_one(self):
        found = toolchain.find_torch()
        assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)

    def test_too_old(self, tmp_path, monkeypatch):
        monkeypatch.setattr(toolchain, "target_site_packages", lambda: [self.fake(tmp_path, "2.9.1")])
        with pytest.raises(BuildError, match=r"needs PyTorch >= 2\.10, found 2\.9\.1"):
            toolchain.find_torch()

    def test_is_required_for_the_build_only_where_there_is_none(self, tmp_path, monkeypatch):
        for hook in (backend.get_requires_for_build_editable, backend.get_requires_for_build_wheel):
            monkeypatch.setattr(toolchain, "target_site_packages", lambda: [tmp_path / "torchless"])
            monkeypatch.delenv("OODKERN_BUILD", raising=False)
            assert "torch>=2.10" in hook()
            monkeypatch.setenv("OODKERN_BUILD", "none")
            assert "torch>=2.10" not in hook()
        self.fake(tmp_path)
        monkeypatch.delenv("OODKERN_BUILD")
        monkeypatch.setattr(toolchain, "target_site_packages", lambda: [tmp_path])
        assert "torch>=2.10" not in backend.get_requires_for_build_editable()


def test_modes(monkeypatch):
    for mode in ("cpu", "CUDA ", "none", ""):
        monkeypatch.setenv("OODKERN_BUILD", mode)
        assert toolchain.build_mode() == (mode.strip().lower() or "auto")
    monkeypatch.setenv("OODKERN_BUILD", "gpu")
    with pytest.raises(BuildError, match="OODKERN_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'"):
        toolchain.build_mode()
    with pytest.raises(SystemExit, match="OODKERN_BUILD: expected one of"):
        backend.get_requires_for_build_editable()


def test_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="apt install g\\+\\+"):
        toolchain.find_compiler()


def test_missing_ninja(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BuildError, match="pip install ninja"):
        native_build.run_ninja(tmp_path)


def test_ninja_of_an_environment_that_is_not_activated(monkeypatch, tmp_path):
    (tmp_path / "scripts").mkdir()
    ninja = tmp_path / "scripts" / "ninja"
    ninja.write_text("#!/bin/sh\n/bin/echo called\n")
    ninja.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_build.sysconfig, "get_path", lambda name: str(tmp_path / name))
    native_build.run_ninja(tmp_path)


def test_another_compiler_or_torch_rebuilds():
    def commands(made_with):
        return native_build.ninja_file(["g++"], toolchain.Cuda(), "_build.so", made_with)

    assert commands("g++ 12; 2.13.0") == commands("g++ 12; 2.13.0")
    assert len({commands("g++ 12; 2.13.0"), commands("g++ 13; 2.13.0"), commands("g++ 12; 2.15.0")}) == 3


def test_another_cuda_compiles_its_own_kernels_alone():
    """The CPU's objects are the same with any CUDA, or none: another build of PyTorch does not compile them anew."""

    def commands(cuda):
        text = native_build.ninja_file(["g++"], cuda, "_build.so", "g++ 12; 2.13.0")
        return {line.split(" = ")[0]: line for line in text.splitlines() if re.match(r"(cuda_)?flags = ", line)}

    old, new = (commands(toolchain.Cuda("/opt/nvcc", version, ("8.0",))) for version in ("13.0", "13.1"))
    assert old["flags"] == new["flags"] == commands(toolchain.Cuda())["flags"]
    assert old["cuda_flags"] != new["cuda_flags"]


def test_no_flag_that_flushes_denormals():
    flags = native_build.ninja_file(["g++"], toolchain.Cuda(), "_build.so")
    assert "fast-math" not in flags
    assert "Ofast" not in flags


def test_what_was_built():
    from oodkern import _build, _native

    assert "++" in _build.compiler or "clang" in _build.compiler
    assert "-O3" in _build.flags
    assert _build.instruction_sets == list(native_build.INSTRUCTION_SETS)
    # Two more are the last of these with another product of bfloat16 matrices.
    found = [name for name in _native.instruction_sets() if name not in ("avx512_bf16", "amx")]
    assert found == _build.instruction_sets[: len(found)]
    assert (_build.cuda_version is None) == bool(_build.cuda_reason)
