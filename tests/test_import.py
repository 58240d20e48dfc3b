"""What importing the package needs and does, in fresh processes."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_needs_torch_and_numpy_alone():
    run("""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"sklearn", "scipy", "omegaconf", "yaml", "tqdm", "matplotlib", "jinja2", "triton"}:
            raise ImportError(f"{name} is blocked")
import torch, numpy
loaded = set(sys.modules)
sys.meta_path.insert(0, Blocker())
import oodkern, oodkern.losses, oodkern.metrics, oodkern.models, oodkern.data
loss = oodkern.losses.EnergyLoss()
z = torch.randn(6, 3, requires_grad=True)
loss(z, torch.tensor([0, 1, 2, -1, -1, 0])).backward()
oodkern.metrics.ood_metrics([0.0, 1.0], [2.0])
""")


def test_plain_import_loads_nothing_heavy():
    heavy = run("""
import torch, numpy, sys
before = set(sys.modules)
import oodkern
print([name for name in sorted(set(sys.modules) - before) if not name.startswith("oodkern")])
""")
    assert heavy.strip() == "[]"


def test_denormals_survive():
    """A library that is linked with -ffast-math makes the whole process flush them to zero."""
    run("""
import torch, numpy as np
small = np.float32(1e-40)
assert small * np.float32(1) != 0
import oodkern
z = torch.randn(2000, 1000, requires_grad=True)
oodkern.energy(z).sum().backward()
assert small * np.float32(1) != 0, "denormals are flushed"
assert (torch.full((100_000,), 1e-40) * 1.0).min() > 0, "denormals are flushed in the worker threads"
""")


def test_names():
    import oodkern

    for name in oodkern.__all__:
        assert getattr(oodkern, name) is not None
    assert {"losses", "energy", "training"} <= set(dir(oodkern))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = oodkern.nonsense
