"""Room `subspace`: alignment, subspace energy, bases."""

import itertools

import pytest
import torch
from bar_product import ProductBar
from bar_product_pytorch import ProductOp
from layouts import FLOATS
from multiplications import Products
from oracle import like, memory_events

import oodkern
from oodkern import reference


def pair(N, D, K):
    return (N, D), (K, D)


def basis(N, D, K):
    return (N, D), (D, K)


# More rows than a wave has with any number of threads.
SIZES = [(5, 3, 4), (7, 33, 12), (4, 1, 1), (64, 100, 257), (300, 65, 1100), (4200, 7, 3), (33, 64, 100)]


def raw_alignment():
    def backward(inputs, needs=(True, True)):
        return (like(torch.ops.oodkern.alignment(*inputs)), *inputs, *needs)

    return [
        ("alignment", tuple),
        ("alignment_backward", backward),
        ("alignment_backward", lambda inputs: backward(inputs, (False, True))),
    ]


def raw_subspace():
    def backward(inputs, needs=(True, True)):
        inside, outside = torch.ops.oodkern.subspace_energy(*inputs)
        return (like(inside), like(outside, seed=8), *inputs, *needs)

    def double_backward(inputs, given=(True, True)):
        return (*(like(t, seed=3) if g else None for t, g in zip(inputs, given, strict=True)), *backward(inputs))

    return [
        ("subspace_energy", tuple),
        ("subspace_energy_backward", backward),
        ("subspace_energy_backward", lambda inputs: backward(inputs, (True, False))),
        ("subspace_energy_double_backward", double_backward),
        ("subspace_energy_double_backward", lambda inputs: double_backward(inputs, (False, True))),
    ]


def eager_alignment(x, w):
    x, w = (torch.nn.functional.normalize(t, dim=-1, eps=1e-30 if t.dtype != torch.float16 else 1e-6) for t in (x, w))
    return (x @ w.T).abs().to(torch.promote_types(x.dtype, torch.float32)).sum(-1) / len(w)


def eager_subspace(x, u):
    inside = x @ u
    outside = x - inside @ u.T
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([(y * y).to(dtype).sum(-1) for y in (inside, outside)])


def norms(rows):
    return rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


class TestAlignment(ProductBar):
    op = ProductOp(
        oodkern.alignment,
        reference.alignment,
        eager_alignment,
        [pair(*sizes) for sizes in SIZES],
        make=pair,
        order=1,
        scale=1.0,
        # The part along a row is taken out: in one dimension nothing is left.
        terms=lambda x, w: (1 / norms(x), len(x) / len(w) / norms(w)),
        # A cosine that rounds to the other side of 0 changes its sign's whole share, 2 / K of the gradient at most:
        # of the cases here none has one so close.
        condition=lambda x, w: 4 * x.shape[1] ** 0.5,
        raw_products=raw_alignment(),
    )


class TestSubspaceEnergy(ProductBar):
    op = ProductOp(
        lambda x, u: torch.stack(oodkern.subspace_energy(x, u)),
        lambda x, u: torch.stack(reference.subspace_energy(x, u)),
        eager_subspace,
        [basis(*sizes) for sizes in SIZES],
        make=basis,
        order=2,
        scale=0.2,  # the gradients of 1,100 directions of norm 8 would leave float16
        by_columns=False,
        mixed=True,
        autocasts=False,
        condition=lambda x, u: 4 * (u.square().sum() ** 0.5 + 1),
        raw_products=raw_subspace(),
    )

    def test_nan_stays_in_its_row(self, dtype):
        x, u = self.op.inputs(self.op.shapes[-1], dtype)
        clean = oodkern.subspace_energy(x, u)
        x[1, -1] = torch.nan
        for ours, before in zip(oodkern.subspace_energy(x, u), clean, strict=True):
            assert ours.isnan().nonzero().flatten().tolist() == [1]
            assert torch.equal(ours[2:], before[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_complement_does_not_cancel(dtype):
    """Residuals of 1e-1 to 1e-3 of the norm; |x|^2 - |U^T x|^2 is 5 % off at the last."""
    D, r = 2048, 128
    u = oodkern.orthonormal_basis(torch.randn(r, D))
    inner = torch.randn(64, r, dtype=torch.float64) @ u.T.double()
    outer = torch.randn(64, D, dtype=torch.float64)
    outer -= outer @ u.double() @ u.T.double()
    for share in (1e-1, 1e-2, 1e-3):
        x = inner / inner.norm(dim=1, keepdim=True) + share * outer / outer.norm(dim=1, keepdim=True)
        x = x.to(dtype)
        inside, outside = oodkern.subspace_energy(x, u)
        exact = reference.subspace_energy(x.double(), u.double())
        assert ((inside - exact[0]).abs() / exact[0]).max() < 1e-5
        assert ((outside - exact[1]).abs() / exact[1]).max() < 1e-4
        if dtype == torch.float32 and share == 1e-3:
            subtracted = (x * x).sum(1) - ((x @ u) ** 2).sum(1)
            assert ((subtracted - exact[1]).abs() / exact[1]).max() > 1e-3  # what is not done here


def test_inside_and_outside_add_up():
    x, w = torch.randn(200, 40), torch.randn(12, 40)
    inside, outside = oodkern.subspace_energy(x, oodkern.orthonormal_basis(w))
    torch.testing.assert_close(inside + outside, x.square().sum(1))
    rows = w * torch.randn(12, 1)  # features along weights have nothing outside
    outside = oodkern.subspace_energy(rows, oodkern.orthonormal_basis(w)).outside
    assert (outside < 1e-9 * rows.square().sum(1)).all()


def test_sixteen_bit_features_and_a_float32_basis():
    x, u = torch.randn(30, 16).half().requires_grad_(), oodkern.orthonormal_basis(torch.randn(4, 16)).requires_grad_()
    value = oodkern.subspace_energy(x, u)
    exact = reference.subspace_energy(x.double(), u.double())
    for ours, oracle in zip(value, exact, strict=True):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(value, (x, u), [like(v) for v in value])
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32]
    wide = x.detach().double()  # orthonormal_basis gives float32, whatever the features are
    for ours, oracle in zip(oodkern.subspace_energy(wide, u.detach()), exact, strict=True):
        torch.testing.assert_close(ours, oracle.detach())
    for features, basis in ((x.detach().float(), u.detach().double()), (wide, u.detach().float())):
        with pytest.raises(RuntimeError, match="basis: expected the dtype of features or of scores"):
            torch.ops.oodkern.subspace_energy(features, basis)
    with pytest.raises(TypeError, match="basis: expected bfloat16 as features are, got float16"):
        oodkern.subspace_energy(torch.randn(3, 16).bfloat16(), u.detach().half())


@pytest.mark.parametrize("dtype", FLOATS)
def test_empty_basis(dtype):
    x = torch.randn(6, 5).to(dtype).requires_grad_()
    inside, outside = oodkern.subspace_energy(x, torch.zeros(5, 0, dtype=dtype))
    assert (inside == 0).all()
    torch.testing.assert_close(outside.double(), x.detach().double().square().sum(1), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(outside, x, torch.ones_like(outside))
    torch.testing.assert_close(gradient, 2 * x.detach())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_have_no_direction(dtype, backend):
    x, w = torch.randn(5, 4).to(dtype), torch.randn(6, 4).to(dtype)
    x[2], w[3] = 0, 0
    x, w = x.requires_grad_(), w.requires_grad_()
    with oodkern.backend(backend):
        value = oodkern.alignment(x, w)
        dx, dw = torch.autograd.grad(value, (x, w), like(value))
    assert value[2] == 0
    assert (dx[2] == 0).all()
    assert (dw[3] == 0).all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    assert ((value >= 0) & (value <= 1 + 1e-6)).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_alignment_does_not_feel_the_scale(backend):
    x, w = torch.randn(50, 20, dtype=torch.float64), torch.randn(30, 20, dtype=torch.float64)
    with oodkern.backend(backend):
        a = oodkern.alignment(x, w)
        b = oodkern.alignment(x * torch.logspace(-9, 9, 50)[:, None], w * torch.logspace(-6, 6, 30)[:, None])
        assert (oodkern.alignment(x, w[:0]) == 0).all()
    torch.testing.assert_close(a, b)
    own = torch.nn.functional.cosine_similarity(x[:, None], w[None], dim=-1).abs().mean(1)
    torch.testing.assert_close(a, own)


class TestOrthonormalBasis:
    @pytest.mark.parametrize("shape", [(10, 64), (64, 10), (7, 7), (1, 5), (300, 20)])
    def test_spans_the_rows(self, shape):
        w = torch.randn(shape)
        u = oodkern.orthonormal_basis(w)
        assert (u.shape, u.dtype) == ((shape[1], min(shape)), torch.float32)
        torch.testing.assert_close(u.T @ u, torch.eye(min(shape)), rtol=0, atol=1e-5)
        torch.testing.assert_close(w @ u @ u.T, w, rtol=1e-4, atol=1e-4)

    def test_numerical_rank(self):
        low = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 30, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            assert oodkern.orthonormal_basis(low.to(dtype)).shape == (30, 4)
        assert oodkern.orthonormal_basis(torch.zeros(3, 5)).shape == (5, 0)
        assert oodkern.orthonormal_basis(torch.zeros(0, 5)).shape == (5, 0)

    def test_leading_directions_come_first(self):
        left, right = (torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q for _ in range(2))
        w = left @ torch.diag(torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0], dtype=torch.float64)) @ right.T
        u = oodkern.orthonormal_basis(w, rank=2).double()
        torch.testing.assert_close((u.T @ right[:, :2]).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-6)

    def test_rejects(self):
        w = torch.randn(4, 6)
        with pytest.raises(ValueError, match=r"rank: expected 0 to 4 for weight \[4, 6\], got 5"):
            oodkern.orthonormal_basis(w, 5)
        with pytest.raises(TypeError, match="rank: expected an integer or None, got float"):
            oodkern.orthonormal_basis(w, 2.0)
        with pytest.raises(ValueError, match=r"weight: expected \[K, D\], got \[4\]"):
            oodkern.orthonormal_basis(w[:, 0])
        assert not oodkern.orthonormal_basis(w.requires_grad_()).requires_grad


def test_weight_gradients_by_slice():
    """16-bit sums of 9 MB are added up slice by slice, and their part along the weights taken out all the same."""
    x, w = torch.randn(1500, 700).half(), torch.randn(6500, 700).half()
    leaf = w.clone().requires_grad_()
    value = oodkern.alignment(x, leaf)
    (gradient,) = torch.autograd.grad(value, leaf, like(value))
    exact = w.double().requires_grad_()
    (oracle,) = torch.autograd.grad(reference.alignment(x.double(), exact), exact, like(value).double())
    assert ((gradient.double() - oracle).abs().max() / oracle.abs().max()) < 1e-2  # signs of cosines near 0
    along = (gradient.double() * w.double()).sum(1) / w.double().norm(dim=1) / oracle.norm(dim=1)
    assert along.abs().max() < 2e-2


@pytest.mark.parametrize(("shape", "least"), [((300, 100, 10), 2), ((5, 100, 20), 4), ((20, 100, 20), 4)])
def test_products_of_the_features_gradient(shape, least):
    """Two where rows are enough to pay for U^T U, which is a fraction of one then; four of few rows."""
    N, D, r = shape
    x, u = torch.randn(N, D, requires_grad=True), torch.randn(D, r)
    with Products(shape) as products:
        value = oodkern.subspace_energy(x, u)
    assert products.count == 2
    with Products(shape) as products:
        torch.autograd.grad(value, x, [like(value[0]), like(value[1])])
    assert least <= products.count <= least + (0.2 if r < N else 0)


@pytest.mark.parametrize("r", [400, 1000])
def test_workspace_of_a_large_basis(r):
    """U^T U counts, and is not formed where it takes too much."""
    x, u = torch.randn(1100, 1000, requires_grad=True), torch.randn(1000, r)
    value = oodkern.subspace_energy(x, u)
    upstream = [like(value[0]), like(value[1])]
    held = memory_events(lambda: torch.autograd.grad(value, x, upstream))
    assert max(itertools.accumulate(held)) - x.nbytes <= 16 << 20
    exact = torch.autograd.grad(reference.subspace_energy(x.double(), u.double()), x, [g.double() for g in upstream])[0]
    (found,) = torch.autograd.grad(oodkern.subspace_energy(x, u), x, upstream)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
