"""Real builds in a copy of the tree, and the built library under another PyTorch."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import toolchain
import torch


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory):
    """A copy of the sources, built."""
    tree = tmp_path_factory.mktemp("tree")
    # Optimising is most of a build's time, and the build that was installed has been optimised.
    compiler = tree / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(toolchain.find_compiler()[0])} "$@" -O0\n')
    compiler.chmod(0o755)
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
        environment = os.environ | {"OODKERN_BUILD": mode, "MAX_JOBS": "2", "CXX": str(tree / "c++")}
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
        assert "/rows.cpp" not in printed

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
def test_cuda_library(tree, tmp_path, monkeypatch):
    """A source in csrc/cuda becomes _cuda.so, which loads under a CUDA build of PyTorch, with or without a GPU."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    if torch.version.cuda and torch.version.cuda.split(".")[0] != toolchain.find_nvcc()[1].split(".")[0]:
        pytest.skip(f"nvcc is of CUDA {toolchain.find_nvcc()[1]}, PyTorch of {torch.version.cuda}")
    copy = shutil.copytree(tree, tmp_path / "tree", symlinks=True)
    for source in (copy / "csrc" / "cuda").glob("*.cu"):
        source.unlink()  # those that are shipped take minutes; the library that was installed has them
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
