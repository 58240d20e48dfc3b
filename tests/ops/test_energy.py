"""Room `energy`: what is special to it; the rest is the bar's."""

import pytest
import torch
from bar import OpBar
from layouts import FLOATS
from op import Op
from oracle import like
from room_energy import eager_energy, eager_joint_energy, largest_finite, terms_of_energy

import oodkern
from oodkern import reference

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
        oodkern.energy,
        reference.energy,
        eager_energy,
        SHAPES,
        raw_arguments("energy", 1.0),
        size=terms_of_energy(1.0),
        condition=largest_finite,
    )


class TestEnergyWithTemperature(OpBar):
    op = Op(
        lambda z: oodkern.energy(z, temperature=0.37),
        lambda z: reference.energy(z, 0.37),
        lambda z: eager_energy(z, 0.37),
        SHAPES,
        raw_arguments("energy", 0.37),
        size=terms_of_energy(0.37),
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
