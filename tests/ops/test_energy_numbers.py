"""Room `energy`, number by number: extreme logits, exponentials, widening and rounding, long rows, many rows."""

import os

import pytest
import torch
from oracle import assert_two_sided, in_float64, value_and_gradients

import oodkern
from oodkern import _native, reference


@pytest.mark.parametrize("name", ["energy", "joint_energy"])
def test_where_the_written_formula_fails(name):
    """log(1 + exp(z)) overflows past 88 and is zero before -17; exp(z) overflows past 88."""
    z = torch.tensor([[-80.0], [-30.0], [-17.5], [90.0], [1000.0]])
    function, oracle = getattr(oodkern, name), getattr(reference, name)
    for a, b in zip(value_and_gradients(function, [z], 2), in_float64(oracle, [z], 2), strict=True):
        assert_two_sided(a, b, b)


def test_small_probabilities_keep_their_relative_accuracy():
    """The row-wise bound forgives a small entry beside a large one: look at them one by one."""
    z = torch.linspace(-60, 0, 601)[None]
    for function, oracle, tolerance in (
        # (z + E) is rounded to float32 before the exponential, in eager too: 60 * 2^-24 * a few.
        (oodkern.energy, reference.energy, 2e-5),
        (oodkern.joint_energy, reference.joint_energy, 1e-6),
    ):
        ours, exact = value_and_gradients(function, [z])[1], in_float64(oracle, [z])[1]
        assert ((ours.double() - exact).abs() / exact.abs()).max() < tolerance


def test_exponentials_are_accurate_to_a_few_units_in_the_last_place():
    """Over one period of the polynomials' argument and beyond, one entry at a time."""
    x = torch.linspace(0, 3, 4001)
    logits = torch.stack([torch.zeros_like(x), -x], -1)  # softmax and sigmoid of every x
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            softmax = -torch.ops.oodkern.energy_backward(torch.ones_like(x), logits, oodkern.energy(logits), 1.0)
            sigmoid = torch.ops.oodkern.joint_energy_backward(torch.ones_like(x), logits)
            softplus = oodkern.joint_energy(logits[:, 1:])
        exact = logits.double()
        for ours, oracle, units in (
            (softmax, exact.softmax(-1), 4.0),
            (sigmoid, exact.sigmoid(), 2.0),
            (softplus, exact[:, 1].exp().log1p(), 2.0),
        ):
            assert ((ours.double() - oracle).abs() / oracle).max() < units * 2**-23, name


def test_the_best_instruction_set_is_in_use():
    family = {"AVX512": "avx512 avx512_bf16 amx", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "baseline"
    )
    best = _native.instruction_sets()[-1]
    assert _native.instruction_set_in_use() == best
    assert best in family.split()
    with _native.instruction_set("baseline"):
        assert _native.instruction_set_in_use() == "baseline"
    assert _native.instruction_set_in_use() == best
    with pytest.raises(RuntimeError, match="name: this processor runs baseline"), _native.instruction_set("mmx"):
        pass


@pytest.mark.parametrize("name", ["energy", "joint_energy"])
def test_a_million_classes(name):
    """Blocks are added up in double: float32 would lose two digits here."""
    z = torch.randn(1, 1_000_000)
    function, oracle = getattr(oodkern, name), getattr(reference, name)
    for a, b in zip(value_and_gradients(function, [z], 2), in_float64(oracle, [z], 2), strict=True):
        assert_two_sided(a, b, b, rows=True, condition=30.0)


@pytest.mark.parametrize("name", ["energy", "joint_energy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_in_vectors(name, dtype):
    """Long rows run through the vector bodies of widening and rounding: bit for bit the float32 result, rounded."""
    z = (torch.randn(64, 130) * torch.logspace(-3, 1, 64)[:, None]).to(dtype)
    backward = getattr(torch.ops.oodkern, f"{name}_backward")
    g = torch.randn(64)
    scores, constants = ([oodkern.energy(z)], [1.0]) if name == "energy" else ([], [])
    whole = backward(g, z, *scores, *constants)
    wide = backward(g, z.float(), *scores, *constants)  # the same arithmetic, not rounded
    assert torch.equal(whole, wide.to(dtype))


@pytest.mark.parametrize("name", ["energy", "joint_energy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_number(name, dtype):
    """Widening and rounding are written by hand: all 65,536 bit patterns, one row each."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    function, oracle = getattr(oodkern, name), getattr(reference, name)
    for a, b in zip(value_and_gradients(function, [z]), in_float64(oracle, [z]), strict=True):
        usable = z.squeeze(-1).isfinite()
        assert_two_sided(a[usable], b[usable], b[usable])
        assert a[z.squeeze(-1).isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even(dtype):
    """One class: dE/dz = -g exactly, so the gradient shows the kernel's rounding of g and nothing else."""
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor(
        [65504.0, 65519.996, 65520.0, 6.1e-5, 6.1035e-5, 5.96e-8, 2.98e-8, 2.99e-8, 0.0, -0.0, torch.inf]
    )
    upstream = torch.cat([bits.view(torch.float32), edges, -edges])
    gradient = torch.ops.oodkern.energy_backward(
        upstream, torch.zeros(len(upstream), 1, dtype=dtype), torch.zeros_like(upstream), 1.0
    )
    expected = (-upstream).to(dtype)
    same = (gradient.squeeze(-1).view(torch.int16) == expected.view(torch.int16)) | expected.isnan() & gradient.squeeze(
        -1
    ).isnan()
    assert same.all(), upstream[~same][:5]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="this system does not tell its free memory")
def test_more_than_two_to_the_31_elements():
    """4.3 GB of bfloat16: offsets past 2^31, checked on the last rows."""
    # With what the system would give back: files that it keeps in memory are most of a machine that builds.
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    if free < 12e9:
        pytest.skip(f"needs 12 GB of free memory, there are {free / 1e9:.1f}")
    rows = 2**31 // 1000 + 100
    z = torch.zeros(rows, 1000, dtype=torch.bfloat16)
    z[-3:] = torch.randn(3, 1000).bfloat16() * 4
    for function, oracle in ((oodkern.energy, reference.energy), (oodkern.joint_energy, reference.joint_energy)):
        tail = z[-3:].clone()
        torch.testing.assert_close(function(z)[-3:].double(), oracle(tail.double()), rtol=1e-5, atol=1e-5)
    gradient = torch.ops.oodkern.joint_energy_backward(torch.ones(()).expand(rows), z)
    torch.testing.assert_close(gradient[-3:], torch.sigmoid(tail.float()).bfloat16())
    assert (gradient[::100_000][:-1] == 0.5).all()


@pytest.mark.skipif(
    not (os.path.exists("/proc/self/smaps") and os.path.exists("/sys/kernel/mm/transparent_hugepage")),
    reason="this system has no transparent large pages, or does not tell",
)
def test_large_gradients_ask_for_large_pages():
    """The mapping of a gradient of 64 MB carries the advice (hg), that of any other tensor does not."""

    def flags_at(address):
        inside = False
        with open("/proc/self/smaps") as file:
            for line in file:
                first = line.split()[0]
                if "-" in first and not first.endswith(":"):
                    begin, end = (int(part, 16) for part in first.split("-"))
                    inside = begin <= address < end
                elif inside and first == "VmFlags:":
                    return line.split()[1:]
        return []

    z = torch.zeros(16_000, 1000)
    gradient = torch.ops.oodkern.joint_energy_backward(torch.ones(16_000), z)
    assert "hg" in flags_at(gradient.data_ptr() + (4 << 20))
    assert "hg" not in flags_at(z.data_ptr() + (4 << 20))
    assert (gradient == 0.5).all()
