from __future__ import annotations

import pytest
import torch
from judge import DEVICE, DTYPES, OPS, assert_gradients, gradients, in_small_waves, leaves, randn
from oracle import assert_two_sided

from oodkern import reference
from oodkern.triton_kernels import subspace

SHAPES = [(37, 45, 50), (1, 7, 1), (16, 32, 32), (5, 3, 70), (33, 16, 2)]


def same_dtype_alignment(features, weight):
    cosines = reference.unit(features) @ reference.unit(weight).T
    return cosines.abs().sum(-1) / len(weight)


def basis_of(D: int, r: int, seed: int = 3) -> torch.Tensor:
    return torch.linalg.qr(randn(D, r, dtype=torch.float64, seed=seed))[0].float()


@pytest.fixture(params=[False, True], ids=["default waves", "small waves"])
def waves(request, monkeypatch):
    if request.param:
        in_small_waves(monkeypatch, subspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alignment(shape, dtype, waves):
    N, D, K = shape
    features, weight = randn(N, D, dtype=dtype), randn(K, D, dtype=dtype, seed=1)
    value = OPS.alignment(features, weight)
    assert value.dtype == torch.float32
    exact = reference.alignment(features.double(), weight.double())
    assert_two_sided(value, exact, reference.alignment(features, weight))
    upstream = randn(N, seed=2)
    ours = OPS.alignment_backward(upstream, features, weight, True, True)

    def of(function):
        return lambda *inputs: [function(*inputs)]

    what = f"alignment {shape}"
    # Of one feature and one class, or in one dimension, nothing but rounding is left when the radial part is gone.
    assert_gradients(
        ours, of(reference.alignment), of(same_dtype_alignment), [features, weight], [upstream], what, condition=8.0
    )


def test_alignment_of_zero_rows_and_classes():
    features, weight = randn(20, 24), randn(40, 24, seed=1)
    features[3], weight[35] = 0.0, 0.0
    value = OPS.alignment(features, weight)
    dx, dw = OPS.alignment_backward(randn(20, seed=2), features, weight, True, True)
    assert value[3] == 0.0
    assert not dx[3].any()
    assert not dw[35].any()
    assert dx[:3].all()
    assert dw[:35].all()


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_alignment_gradients_not_asked_for(wants):
    features, weight, upstream = randn(20, 24), randn(40, 24, seed=1), randn(20, seed=2)
    both = OPS.alignment_backward(upstream, features, weight, True, True)
    for gradient, full, wanted in zip(
        OPS.alignment_backward(upstream, features, weight, *wants), both, wants, strict=True
    ):
        assert torch.equal(gradient, full) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize(("scale", "size"), [(1e-6, 1e-3), (1e4, 1e3)])
def test_alignment_of_extreme_upstreams_in_float16(scale, size):
    # Small features bring the gradients for upstreams of 1e-6 back into the range of float16.
    features, weight = (randn(n, 24, dtype=torch.float16, seed=n, scale=size) for n in (40, 20))
    upstream = randn(40, seed=2, scale=scale)
    ours = OPS.alignment_backward(upstream, features, weight, True, True)
    exact = gradients(
        lambda *inputs: [reference.alignment(*inputs)], leaves([features, weight], torch.float64), [upstream]
    )
    for our, oracle in zip(ours, exact, strict=True):
        error = (our.double() - oracle).abs().amax(-1)
        assert bool((error <= 2 * 2.0**-10 * oracle.abs().amax(-1) + 2.0**-24).all())


@pytest.mark.parametrize("sizes", [(0, 8, 5), (6, 8, 0), (6, 0, 5)], ids=str)
def test_alignment_of_nothing(sizes):
    N, D, K = sizes
    features, weight = randn(N, D), randn(K, D)
    assert torch.equal(OPS.alignment(features, weight), torch.zeros(N, device=DEVICE))
    dx, dw = OPS.alignment_backward(randn(N), features, weight, True, True)
    assert dx.shape == (N, D)
    assert dw.shape == (K, D)
    assert not dx.any()
    assert not dw.any()


def test_nan_stays_in_its_row():
    features, weight, basis = randn(40, 24), randn(30, 24, seed=1), basis_of(24, 5)
    features[7, 3] = torch.nan
    inside, outside = OPS.subspace_energy(features, basis)
    upstream = randn(40, seed=2)
    dx = OPS.alignment_backward(upstream, features, weight, True, False)[0]
    dx_energy = OPS.subspace_energy_backward(upstream, upstream, features, basis, True, False)[0]
    for result in (OPS.alignment(features, weight), inside, outside, dx.sum(-1), dx_energy.sum(-1)):
        assert result.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    features = randn(74, 64, dtype=dtype)[::2, 3:48]
    weight = randn(45, 50, dtype=dtype, seed=1).T
    basis = randn(9, 45, seed=2, scale=0.2).T
    upstream = randn(1, seed=3).expand(37)
    arguments = {
        "alignment": (features, weight),
        "alignment_backward": (upstream, features, weight, True, True),
        "subspace_energy": (features, basis),
        "subspace_energy_backward": (upstream, upstream, features, basis, True, True),
        "subspace_energy_double_backward": (features, basis, upstream, upstream, features, basis, True, True),
    }
    for name, given in arguments.items():
        dense = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in given]
        results, expected = getattr(OPS, name)(*given), getattr(OPS, name)(*dense)
        for result, same in zip(*((r,) if torch.is_tensor(r) else r for r in (results, expected)), strict=True):
            torch.testing.assert_close(result, same, rtol=1e-6 if result.dtype == torch.float32 else 2e-3, atol=1e-6)


ENERGY_SHAPES = [(37, 45, 9), (1, 7, 1), (16, 32, 32), (20, 33, 0), (130, 70, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("same_basis", [False, True], ids=["float32 basis", "basis of the features' dtype"])
@pytest.mark.parametrize("shape", ENERGY_SHAPES, ids=str)
def test_subspace_energy(shape, same_basis, dtype, waves):
    N, D, r = shape
    features = randn(N, D, dtype=dtype)
    # Not orthonormal: the formulas hold for any basis.
    basis = randn(D, r, dtype=dtype if same_basis else torch.float32, seed=1, scale=0.3)
    results = OPS.subspace_energy(features, basis)
    exact = reference.subspace_energy(features.double(), basis.double())
    eager = reference.subspace_energy(features, basis)
    for result, oracle, same, what in zip(results, exact, eager, ("inside", "outside"), strict=True):
        assert_two_sided(result, oracle, same, what, size=(features.double() ** 2).sum(-1))
    upstreams = [randn(N, seed=2), randn(N, seed=3)]
    ours = OPS.subspace_energy_backward(*upstreams, features, basis, True, True)
    assert_gradients(
        ours,
        reference.subspace_energy,
        reference.subspace_energy,
        [features, basis],
        upstreams,
        f"subspace_energy {shape}",
        condition=8.0,
    )


def test_complement_of_what_lies_almost_inside():
    D, r = 300, 20
    basis = basis_of(D, r)
    inside = randn(40, r, dtype=torch.float64) @ basis.double().T
    outside = randn(40, D, dtype=torch.float64, seed=4)
    outside *= 1e-3 * inside.norm(dim=-1, keepdim=True) / outside.norm(dim=-1, keepdim=True)
    features = (inside + outside).float()
    exact = reference.subspace_energy(features.double(), basis.double())[1]
    assert float(((OPS.subspace_energy(features, basis)[1] - exact) / exact).abs().max()) < 1e-4


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_subspace_energy_gradients_not_asked_for(wants):
    features, basis = randn(20, 24), basis_of(24, 5)
    upstreams = randn(20, seed=2), randn(20, seed=3)
    cotangents = randn(20, 24, seed=4), randn(24, 5, seed=5)
    for name, given, kept in (
        ("subspace_energy_backward", (), 0),
        ("subspace_energy_double_backward", cotangents, 2),
    ):
        full = getattr(OPS, name)(*given, *upstreams, features, basis, True, True)
        some = getattr(OPS, name)(*given, *upstreams, features, basis, *wants)
        for i, (gradient, same) in enumerate(zip(some, full, strict=True)):
            wanted = i < kept or wants[i - kept]
            assert torch.equal(gradient, same) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("shape", ENERGY_SHAPES, ids=str)
def test_subspace_energy_double_backward(shape, given, dtype, waves):
    N, D, r = shape
    features, basis = randn(N, D, dtype=dtype), randn(D, r, seed=1, scale=0.3)
    upstreams = [randn(N, seed=2), randn(N, seed=3)]
    cotangents = [randn(N, D, dtype=dtype, seed=4), randn(D, r, seed=5)]
    ours = OPS.subspace_energy_double_backward(
        *(c if there else None for c, there in zip(cotangents, given, strict=True)),
        *upstreams,
        features,
        basis,
        True,
        True,
    )

    def second(widened: bool) -> list[torch.Tensor]:
        dtype64 = torch.float64 if widened else None
        inputs = leaves([*upstreams, features, basis], dtype64)
        values = reference.subspace_energy(*inputs[2:])
        first = torch.autograd.grad(values, inputs[2:], inputs[:2], create_graph=True)
        total = sum((g * c.to(g.dtype)).sum() for g, c, there in zip(first, cotangents, given, strict=True) if there)
        # The sum keeps every input in the graph where there is nothing to differentiate, as for r = 0.
        return list(torch.autograd.grad(total + 0 * sum(t.sum() for t in inputs), inputs))

    names = ("grad_inside", "grad_outside", "features", "basis")
    for our, oracle, same, name in zip(ours, second(True), second(False), names, strict=True):
        assert our.dtype == same.dtype
        # Every entry of these sums of N, D or r terms cancels; they are as large as the largest entry.
        size = oracle.abs().amax() if oracle.numel() else oracle
        assert_two_sided(our, oracle, same, name, rows=our.dim() > 1, size=size.expand(oracle.shape), condition=8.0)
