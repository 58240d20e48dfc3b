"""Room `energy`: what is special to it; the rest is the bar's."""

import os

import pytest
import torch
from bar import Op, OpBar
from layouts import FLOATS
from oracle import assert_two_sided, in_float64, like, value_and_gradients

import oodkern
from oodkern import _native, reference

SHAPES = [
    ((3, 5),),
    ((2, 3, 4),),
    ((1, 1),),
    ((7, 1),),
    ((4, 17),),
    ((5, 1024),),
    ((3, 1025),),
    ((3, 2500),),
    ((33, 1000),),
]


def largest_finite(z):
    """Rounding E, as large as the logits, moves E / T and with it every softmax of the row by that much."""
    return z.abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True) if z.shape[-1] else torch.zeros(())


def eager_energy(logits, temperature=1.0):
    return -temperature * torch.logsumexp(logits / temperature, -1)


def eager_joint_energy(logits):
    return torch.nn.functional.softplus(logits).sum(-1)


def raw_arguments(name, *constants):
    """The arguments of a raw op and of its derivatives, from logits."""

    def forward(z):
        return (z, *constants)

    def score(z):
        return [getattr(torch.ops.oodkern, name)(z, *constants)] if name == "energy" else []

    def backward(z):
        return (like(getattr(torch.ops.oodkern, name)(z, *constants)), z, *score(z), *constants)

    def double_backward(z):
        return (like(z, seed=3), *backward(z))

    return [(name, forward), (f"{name}_backward", backward), (f"{name}_double_backward", double_backward)]


class TestEnergy(OpBar):
    op = Op(
        oodkern.energy, reference.energy, eager_energy, SHAPES, raw_arguments("energy", 1.0), condition=largest_finite
    )


class TestEnergyWithTemperature(OpBar):
    op = Op(
        lambda z: oodkern.energy(z, temperature=0.37),
        lambda z: reference.energy(z, 0.37),
        lambda z: eager_energy(z, 0.37),
        SHAPES,
        raw_arguments("energy", 0.37),
        condition=lambda z: 1 / 0.37 * largest_finite(z),
    )


class TestJointEnergy(OpBar):
    op = Op(oodkern.joint_energy, reference.joint_energy, eager_joint_energy, SHAPES, raw_arguments("joint_energy"))


class TestReference:
    """The oracle itself, against PyTorch where PyTorch is right, in float64."""

    def test_energy(self):
        z = torch.randn(50, 9, dtype=torch.float64) * 10
        torch.testing.assert_close(reference.energy(z, 0.7), eager_energy(z, 0.7), rtol=1e-14, atol=1e-14)

    def test_joint_energy(self):
        z = torch.linspace(-40, 40, 901, dtype=torch.float64)[:, None]
        exact = torch.where(z > 0, z, 0) + torch.log1p(torch.exp(-z.abs()))
        torch.testing.assert_close(reference.joint_energy(z), exact.squeeze(-1), rtol=1e-14, atol=0)

    def test_gradients(self):
        z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: reference.energy(t, 0.7), z, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda t: reference.energy(t, 0.7), z)
        assert torch.autograd.gradcheck(reference.joint_energy, z)
        assert torch.autograd.gradgradcheck(reference.joint_energy, z)

    def test_half_way_gradient_of_softplus(self):
        z = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(reference.joint_energy(z).sum(), z)
        assert gradient.item() == 0.5


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
class TestInfinities:
    """Rows that hold infinities, on every backend."""

    @pytest.fixture(autouse=True)
    def demand(self, backend):
        with oodkern.backend(backend):
            yield

    def test_row_of_minus_infinity(self, dtype, backend):
        z = torch.tensor([[-torch.inf] * 3, [1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
        energy = oodkern.energy(z)
        assert energy[0] == torch.inf
        (gradient,) = torch.autograd.grad(energy, z, like(energy))
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).all()
        assert oodkern.joint_energy(z)[0] == 0

    def test_some_minus_infinity(self, dtype, backend):
        z = torch.tensor([[-torch.inf, 0.5, 1.0]], dtype=dtype, requires_grad=True)
        energy = oodkern.energy(z)
        torch.testing.assert_close(energy, oodkern.energy(z[:, 1:]))
        (gradient,) = torch.autograd.grad(energy, z, like(energy))
        assert gradient[0, 0] == 0
        assert gradient.isfinite().all()

    def test_plus_infinity(self, dtype, backend):
        for row in (
            [torch.inf, 0.0, 1.0],
            [torch.inf, -torch.inf, torch.inf],
            [3.0] * 1500 + [torch.inf] + [5.0] * 1500,
        ):
            z = torch.tensor([row], dtype=dtype)
            assert oodkern.energy(z) == -torch.inf
            assert oodkern.joint_energy(z) == torch.inf

    def test_nan_beside_infinity(self, dtype, backend):
        for other in (torch.inf, -torch.inf):
            z = torch.tensor([[other, torch.nan, 1.0], [0.0, 1.0, 2.0]], dtype=dtype)
            assert oodkern.energy(z).isnan().tolist() == [True, False]
            assert oodkern.joint_energy(z).isnan().tolist() == [True, False]

    def test_large_logits(self, dtype, backend):
        limit = torch.finfo(dtype).max / 4
        z = torch.tensor([[limit, -limit]], dtype=dtype)
        assert oodkern.energy(z) == -limit
        assert oodkern.joint_energy(z) == limit


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
        ours, exact = (value_and_gradients(f, [x])[1] for f, x in ((function, z), (oracle, z.double())))
        exact = exact * (ours.sign() * exact.sign())  # the upstream of a float64 score is drawn in float64
        upstream, upstream64 = like(torch.empty(1)), like(torch.empty(1, dtype=torch.float64))
        exact = exact * (upstream.double() / upstream64).abs()
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
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    assert _native.instruction_set_in_use() == _native.instruction_sets()[-1] == best
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
    """Long rows run through the vector bodies of widening and rounding: bit for bit what rows of one class give."""
    z = (torch.randn(64, 130) * torch.logspace(-3, 1, 64)[:, None]).to(dtype)
    backward = getattr(torch.ops.oodkern, f"{name}_backward")
    g = torch.randn(64)
    scores, constants = ([oodkern.energy(z)], [1.0]) if name == "energy" else ([], [])
    whole = backward(g, z, *scores, *constants)
    wide = backward(g, z.float(), *scores, *constants)  # the same arithmetic, not rounded
    assert torch.equal(whole, wide.to(dtype))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), 1e-39, 1e39])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        oodkern.energy(torch.ones(2, 3), temperature)


def test_temperature_must_be_a_number():
    for temperature in ("1", torch.tensor(1.0), None, True):
        with pytest.raises(TypeError, match="temperature: expected a number, got"):
            oodkern.energy(torch.ones(2, 3), temperature)


def test_raw_ops_guard_their_memory():
    ops = torch.ops.oodkern
    z = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="grad: expected one number per row"):
        ops.energy_backward(torch.ones(3), z, torch.ones(4), 1.0)
    with pytest.raises(RuntimeError, match="energy: expected one number per row"):
        ops.energy_backward(torch.ones(4), z, torch.ones(4, dtype=torch.float64), 1.0)
    with pytest.raises(RuntimeError, match="cotangent: expected the shape"):
        ops.joint_energy_double_backward(torch.ones(4, 4), torch.ones(4), z)
    with pytest.raises(RuntimeError, match="logits: expected float64"):
        ops.energy(torch.ones(2, 3, dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="without dimensions"):
        ops.joint_energy(torch.tensor(1.0))


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
def test_more_than_two_to_the_31_elements():
    """4.3 GB of bfloat16: offsets past 2^31, checked on the last rows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
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


def test_graph_nodes_keep_their_own_names():
    """Attributes set on a Function's context become the node's, and `name` would hide the method `name()`."""
    z = torch.randn(2, 3, requires_grad=True)
    assert oodkern.energy(z).grad_fn.name() == "RowScoreBackward"
    with torch.autograd.detect_anomaly(check_nan=True):
        oodkern.energy(z).sum().backward()


def test_compiles_with_symbolic_shapes_and_temperatures():
    torch._dynamo.reset()
    compiled = torch.compile(oodkern.energy, fullgraph=True, dynamic=True)
    for rows, temperature in ((5, 1.0), (7, 0.5), (9, 2.5)):
        z = torch.randn(rows, 11)
        torch.testing.assert_close(compiled(z, temperature), oodkern.energy(z, temperature), rtol=0, atol=0)
