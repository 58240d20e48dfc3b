"""The build: its decisions as pure functions, and one real build in a copy of the tree."""

import os
import shutil
import subprocess
import sys
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


def test_no_flag_that_flushes_denormals():
    flags = native_build.ninja_file(["g++"], toolchain.Cuda(), "_build.so")
    assert "fast-math" not in flags
    assert "Ofast" not in flags


def test_what_was_built():
    from oodkern import _build, _native

    assert "++" in _build.compiler or "clang" in _build.compiler
    assert "-O3" in _build.flags
    assert _build.instruction_sets == list(native_build.INSTRUCTION_SETS)
    assert _native.instruction_sets() == _build.instruction_sets[: len(_native.instruction_sets())]
    assert (_build.cuda_version is None) == bool(_build.cuda_reason)


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory):
    """A copy of the sources, built."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "oodkern"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, tree / name)
    TestRealBuild.build(tree)
    return tree


@pytest.mark.slow
class TestRealBuild:
    """One build in a copy of the tree, then what follows from it."""

    @staticmethod
    def build(tree, mode="cpu"):
        environment = os.environ | {"OODKERN_BUILD": mode, "MAX_JOBS": "2"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @staticmethod
    def python(tree, program):
        done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    USE = (
        "import oodkern, torch; z = torch.randn(4, 5, requires_grad=True); e = oodkern.energy(z); e.sum().backward(); "
        "print(oodkern.__file__, e.grad_fn.name())"
    )

    def test_builds_and_loads(self, tree):
        assert (tree / "oodkern" / "_cpu.so").is_file()
        done = self.python(tree, self.USE)
        assert str(tree) in done.stdout
        assert "RowScore" in done.stdout
        assert done.stderr == ""

    def test_unchanged_rebuild_does_nothing(self, tree):
        before = (tree / "oodkern" / "_cpu.so").stat().st_mtime_ns
        assert "no work to do" in self.build(tree)
        assert (tree / "oodkern" / "_cpu.so").stat().st_mtime_ns == before

    def test_a_change_rebuilds_what_depends_on_it(self, tree):
        header = tree / "csrc" / "check.h"
        header.write_text(header.read_text() + "\n")
        printed = self.build(tree)
        assert "energy.o" in printed
        assert "rows.cpp" not in printed

    def test_compiler_errors_are_shown(self, tree):
        source = tree / "csrc" / "schema.cpp"
        good = source.read_text()
        source.write_text(good + "\nnonsense;\n")
        with pytest.raises(AssertionError, match="nonsense"):
            self.build(tree)
        source.write_text(good)
        self.build(tree)

    def test_a_broken_library_is_said_once_and_done_without(self, tree):
        library = tree / "oodkern" / "_cpu.so"
        content = library.read_bytes()
        library.unlink()
        library.write_bytes(b"not a library")
        done = self.python(tree, self.USE)
        assert done.stderr.count("oodkern has no native CPU kernels (_cpu.so does not load under PyTorch") == 1
        assert "RowScore" not in done.stdout
        library.unlink()
        library.write_bytes(content)

    def test_without_native_code(self, tree):
        assert "no native code" in self.build(tree, mode="none")
        assert not list((tree / "oodkern").glob("*.so"))
        done = self.python(tree, self.USE + "; import oodkern.losses, oodkern.ops; print(oodkern.joint_energy(z))")
        assert done.stderr.count("oodkern has no native CPU kernels (_cpu.so was not built)") == 1
        assert "RowScore" not in done.stdout
        done = self.python(tree, "import oodkern.cli; oodkern.cli.main(['doctor'])")
        assert "energy on cpu: reference" in done.stdout
        forced = "import oodkern, torch\nwith oodkern.backend('native'): oodkern.energy(torch.ones(2, 3))"
        with pytest.raises(AssertionError, match=r"cannot compute `energy` on cpu: _cpu\.so was not built"):
            self.python(tree, forced)
        self.build(tree)


PROBE = """
#include "../stable.h"
__global__ void twice(float* values, int64_t count) {  // [count]
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) values[i] *= 2.0f;
}
int64_t probe(int64_t x) { return 2 * x; }
STABLE_TORCH_LIBRARY_FRAGMENT(oodkern, m) { m.def("probe(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(oodkern, CompositeExplicitAutograd, m) { m.impl("probe", TORCH_BOX(&probe)); }
"""


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no CUDA compiler (nvcc) here")
def test_cuda_library(root, tree, tmp_path):
    """A source in csrc/cuda becomes _cuda.so, which loads under a CUDA build of PyTorch, with or without a GPU."""
    if torch.version.cuda and torch.version.cuda.split(".")[0] != toolchain.find_nvcc()[1].split(".")[0]:
        pytest.skip(f"nvcc is of CUDA {toolchain.find_nvcc()[1]}, PyTorch of {torch.version.cuda}")
    copy = shutil.copytree(tree, tmp_path / "tree", symlinks=True)
    (copy / "csrc" / "cuda").mkdir(exist_ok=True)
    (copy / "csrc" / "cuda" / "probe.cu").write_text(PROBE)
    TestRealBuild.build(copy, mode="cuda")
    assert (copy / "oodkern" / "_cuda.so").is_file()
    program = """
import torch, oodkern
from oodkern import _build, _native
print(_build.cuda_version, _build.cuda_architectures, repr(_build.cuda_reason))
if torch.version.cuda:
    assert _native.missing["cuda"] == "" and torch.ops.oodkern.probe(21) == 42
else:
    assert "CPU-only" in _native.missing["cuda"]
"""
    printed = TestRealBuild.python(copy, program).stdout
    assert printed.startswith(toolchain.find_nvcc()[1])
    assert printed.endswith("''\n")
    assert "no work to do" in TestRealBuild.build(copy, mode="cuda")
    TestRealBuild.build(copy, mode="cpu")
    assert not (copy / "oodkern" / "_cuda.so").exists()


SECOND = """
import sys, warnings
warnings.simplefilter("error")
import torch
print(torch.__version__)
import oodkern
z = (torch.randn(300, 1000) * 4).requires_grad_()
for op, oracle in (
    (oodkern.energy, lambda z: -torch.logsumexp(z, -1)),
    (oodkern.joint_energy, lambda z: torch.nn.functional.softplus(z).sum(-1)),
):
    with oodkern.backend("native"):
        value = op(z)
    torch.testing.assert_close(value, oracle(z), rtol=1e-5, atol=1e-5)
    g = torch.randn(300)
    (ours,), (expected,) = torch.autograd.grad(value, z, g), torch.autograd.grad(oracle(z), z, g)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with oodkern.backend("native"):
        assert torch.autograd.gradcheck(op, x) and torch.autograd.gradgradcheck(op, x)
"""


def test_the_same_library_under_another_torch(root, pytestconfig):
    """Built once, against this PyTorch; loaded under the one of `--second-python`."""
    second = pytestconfig.getoption("--second-python")
    if not second:
        pytest.skip("give --second-python=PATH, an interpreter of this version with another PyTorch >= 2.10 and numpy")
    library = root / "oodkern" / "_cpu.so"
    before = library.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([second, "-c", SECOND], env=environment, capture_output=True, text=True, cwd=root / "tests")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != torch.__version__, "the second PyTorch is the first one"
    assert library.read_bytes() == before
