import inspect

import pytest
import torch

import oodkern
from oodkern import backends, reference, triton_kernels
from oodkern.backends import BACKENDS, KERNELS, available_backends, backend, choose_backend
from oodkern.ops import _product
from oodkern.ops._foreseen import can_foresee


def test_choice_is_a_function_of_its_arguments():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choose_backend("energy", 100, 0, 10, dtype, "cpu") == "native"
        assert choose_backend("energy", 100, 0, 10, dtype, "cpu", available=("reference",)) == "reference"
        assert choose_backend("energy", 100, 0, 10, dtype, "sm_90") == "native"
        assert choose_backend("energy", 100, 0, 10, dtype, "sm_90", available=("triton", "reference")) == "reference"
        assert choose_backend("energy", 100, 0, 10, dtype, "sm_80") == "native"
        assert choose_backend("energy", 100, 0, 10, dtype, "sm_75") == "reference"  # older than what is compiled
        assert choose_backend("energy", 100, 0, 10, dtype, "mps") == "reference"
    assert choose_backend("energy", 100, 0, 10, torch.int64, "cpu") == "reference"
    assert next(iter(inspect.signature(choose_backend).parameters)) == "room"
    with pytest.raises(
        ValueError,
        match=f"room: expected one of {', '.join(KERNELS)}, got 'enery'",
    ):
        choose_backend("enery", 1, 1, 1, torch.float32, "cpu")


@pytest.mark.parametrize("room", ["linear_energy", "subspace", "select"])
def test_few_classes_are_streamed(room):
    """Native CUDA kernels of 16-bit features and up to 192 classes, whose derivatives are Triton's."""

    def chosen(D, K, dtype=torch.bfloat16, available=backends.BACKENDS):
        return choose_backend(room, 1000, D, K, dtype, "sm_90", available)

    for K in (1, 10, 192):
        assert chosen(512, K) == chosen(512, K, torch.float16) == "native"
        assert chosen(512, K, torch.float32) == "triton"
        assert chosen(512, K, torch.float64) == "reference"
        assert chosen(512, K, available=("triton", "reference")) == "triton"
        assert chosen(512, K, available=("native", "reference")) == ("native" if room == "select" else "reference")
    for D, K in ((512, 0), (512, 193), (0, 10), ((1 << 20) + 1, 10)):
        assert chosen(D, K) == "triton"
    assert choose_backend(room, 1000, 512, 1000, torch.bfloat16, "cpu") == "native"


def test_streams_are_as_wide_as_their_kernels(root):
    kernels, host = ((root / "csrc" / "cuda" / name).read_text() for name in ("stream.cuh", "stream.cu"))
    assert f"kMostClasses = {backends.STREAM_CLASSES};" in kernels
    assert f"features.size(1) <= 1 << {backends.STREAM_FEATURES.bit_length() - 1}," in host


@pytest.mark.parametrize("missing", ["", "Triton is not there"])
def test_derivatives_of_streams_are_tritons(monkeypatch, missing):
    from torch._subclasses.fake_tensor import FakeTensorMode

    called = []
    monkeypatch.setattr(_product, "_call", lambda *names: called.append(names[:2]))
    monkeypatch.setitem(triton_kernels.missing, "cuda", missing)
    x = torch.zeros(3, 4)
    _product.raw("native", "alignment_backward", x, x, x, True, True)
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")
    _product.raw("native", "alignment", x, x)
    _product.raw("triton", "alignment_backward", x, x, x, True, True)
    assert called == [
        ("oodkern", "alignment_backward"),
        ("oodkern", "alignment"),
        ("oodkern_triton", "alignment_backward"),
    ]
    rooms = ("linear_score", "alignment", "subspace_energy")
    declared = {schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()}
    declared = {name for library, _, name in declared if library == "oodkern" and name.startswith(rooms)}
    derivatives = {name for name in declared if name.endswith("backward")}
    assert len(derivatives) == 5
    for name in derivatives:
        if missing:
            with pytest.raises(RuntimeError, match=f"has no {name} on cuda, and Triton: Triton is not there"):
                _product.raw("native", name, x)
        else:
            _product.raw("native", name, x)
            assert called[-1] == ("oodkern_triton", name)


def test_gradients_are_foreseen_on_the_cpu_alone():
    for device, expected in (("cpu", True), ("meta", False)):
        assert can_foresee("native", torch.empty(2, 2, device=device, requires_grad=True)) is expected


def test_table_names_known_backends():
    for devices in KERNELS.values():
        for names in devices.values():
            assert set(names) <= set(BACKENDS) - {"reference"}


def grad_name(z):
    return oodkern.energy(z).grad_fn.name()


def test_demand_is_obeyed_and_restored():
    z = torch.randn(3, 4, requires_grad=True)
    assert "RowScore" in grad_name(z)
    with backend("reference"):
        assert "RowScore" not in grad_name(z)
        with backend("native"):
            assert "RowScore" in grad_name(z)
        assert "RowScore" not in grad_name(z)
        with pytest.raises(ZeroDivisionError), backend("native"):
            raise ZeroDivisionError
        assert "RowScore" not in grad_name(z)
    assert "RowScore" in grad_name(z)


def test_a_demand_that_cannot_be_met_is_an_error():
    z = torch.randn(3, 4)
    with (
        pytest.raises(ValueError, match="name: expected one of native, triton, reference, got 'cuda'"),
        backend("cuda"),
    ):
        pass
    with (
        backend("triton"),
        pytest.raises(
            RuntimeError, match=r"backend\('triton'\) cannot compute `energy` on cpu: it has native, reference"
        ),
    ):
        oodkern.energy(z)


def test_other_devices_take_the_reference():
    """A meta tensor stands for a device without kernels: shapes and dtypes come out, from plain PyTorch."""
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        z = torch.empty(5, 7, dtype=dtype, device="meta")
        for function in (oodkern.energy, oodkern.joint_energy):
            value = function(z)
            assert (value.shape, value.dtype, value.device.type) == ((5,), expected, "meta")
        x, w = (torch.empty(n, 7, dtype=dtype, device="meta") for n in (5, 3))
        for value in (
            oodkern.linear_energy(x, w),
            oodkern.linear_joint_energy(x, w),
            oodkern.linear_scores(x, w).msp,
            oodkern.alignment(x, w),
            oodkern.subspace_energy(x, w.T).outside,
            oodkern.info_nce(x, x, torch.empty(5, dtype=torch.int64, device="meta")),
        ):
            assert (value.shape, value.dtype, value.device.type) == ((5,), expected, "meta")
    assert available_backends("meta") == ("reference",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_does_not_round_under_autocast(dtype):
    """Autocast casts the inputs of a product; what becomes of it stays float32."""
    x, w = torch.randn(6, 40), torch.randn(9, 40)
    u = oodkern.orthonormal_basis(w)
    rounded = x.to(dtype), w.to(dtype)
    with backend("reference"), torch.autocast("cpu", dtype):
        results = (
            oodkern.linear_energy(x, w),
            oodkern.alignment(x, w),
            oodkern.info_nce(x, w, torch.arange(6)),
            oodkern.subspace_energy(x, u).outside,
        )
    exact = (
        reference.linear_energy(*(t.double() for t in rounded)),
        reference.alignment(*(t.double() for t in rounded)),
        reference.info_nce(*(t.double() for t in rounded), torch.arange(6)),
        reference.subspace_energy(x.double(), u.double())[1],
    )
    for ours, oracle in zip(results, exact, strict=True):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-5)


def test_both_backends_agree():
    z = torch.randn(40, 100)
    for function, oracle in ((oodkern.energy, reference.energy), (oodkern.joint_energy, reference.joint_energy)):
        with backend("native"):
            native = function(z)
        with backend("reference"):
            assert torch.equal(function(z), oracle(z))
        torch.testing.assert_close(native, oracle(z), rtol=1e-6, atol=1e-6)


def test_switching_under_compile():
    """The demand is a global that torch.compile guards on: switching recompiles rather than staying with the first."""
    torch._dynamo.reset()
    compiled = torch.compile(oodkern.energy, fullgraph=True)
    z = torch.randn(4, 6)
    expected = oodkern.energy(z)
    torch.testing.assert_close(compiled(z), expected)
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    with backend("reference"):
        torch.testing.assert_close(compiled(z), expected)
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("device", ["cpu"])
def test_arch(device):
    assert backends.arch_of(torch.device(device)) == device


@pytest.mark.gpu
def test_cuda_tensors_take_what_there_is():
    z = torch.randn(40, 100, device="cuda", requires_grad=True)
    energy = oodkern.energy(z)
    torch.testing.assert_close(energy, -torch.logsumexp(z, -1))
    assert ("RowScore" in energy.grad_fn.name()) == (not backends.missing("native", "cuda"))
    assert backends.arch_of(z.device).startswith("sm_")
