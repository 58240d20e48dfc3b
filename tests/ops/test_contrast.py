"""Room `contrast`: InfoNCE."""

import pytest
import torch
from bar_product import ProductBar
from bar_product_pytorch import ProductOp
from layouts import FLOATS
from multiplications import Products
from oracle import in_float64, like, value_and_gradients

import oodkern
from oodkern import reference

# More rows than a wave has with any number of threads; more features than a block of a product is deep.
SIZES = [(5, 3, 4), (7, 33, 12), (4, 1, 1), (64, 100, 257), (300, 65, 1100), (4200, 3, 5), (9, 1100, 6), (33, 64, 100)]
SQUARE = [(5, 3, 5), (7, 33, 7), (1, 4, 1), (257, 100, 257), (1100, 65, 1100), (100, 64, 100)]


def pair(N, D, K):
    return (N, D), (K, D)


def square(N, D, K):
    return (N, D), (N, D)


def target_of(q, k):
    """Every query has a positive; keys may have none or several."""
    return (torch.arange(len(q)) * 7 + 3) % len(k)


def labels_of(q, k):
    """Some queries and some keys have no positive."""
    return torch.arange(len(q)) % 5, torch.arange(len(k)) % 4 + 1


def raw(symmetric, labelled=False):
    def forward(inputs):
        q, k = inputs
        labels = (None, *labels_of(q, k)) if labelled else (target_of(q, k), None, None)
        temperature = torch.tensor(0.5, dtype=torch.promote_types(q.dtype, torch.float32))
        return (q, k, *labels, temperature, True, symmetric)

    def backward(inputs, needs=(True, True)):
        *tensors, normalize, both = forward(inputs)
        loss, rows, columns = torch.ops.oodkern.info_nce(*tensors, normalize, both)
        return (like(loss), *tensors, rows, columns, normalize, both, *needs)

    return [("info_nce", forward), ("info_nce_backward", backward)]


def op(normalize=True, symmetric=False, labelled=False, temperature=0.5, raw_products=()):
    def call(function):
        def of(q, k):
            target, positives = (None, labels_of(q, k)) if labelled else (target_of(q, k), None)
            return function(q, k, target, temperature, normalize, symmetric, positives)

        return of

    def eager(q, k):
        """In the dtype of the inputs, scores and masks formed."""
        if normalize:
            q, k = (torch.nn.functional.normalize(t, dim=-1, eps=1e-6) for t in (q, k))
        s = (q @ k.T / temperature).to(torch.promote_types(q.dtype, torch.float32))
        same = torch.eye(len(k), dtype=torch.bool)[target_of(q, k)]
        if labelled:
            same = labels_of(q, k)[0][:, None] == labels_of(q, k)[1]

        def direction(s, same):
            count = same.sum(1)
            return torch.where(count > 0, s.logsumexp(1) - (s * same).sum(1) / count.clamp_min(1), 0.0)

        rows = direction(s, same)
        if not symmetric:
            return rows
        if labelled:
            return (rows + direction(s.T, same.T)) / 2
        target = target_of(q, k)
        picked = s.gather(1, target[:, None]).squeeze(1)
        return (rows + s.T.logsumexp(1)[target] - picked) / 2

    def condition(q, k):
        """A relative rounding of a score moves its exponential by the score."""
        if normalize:
            q, k = reference.unit(q), reference.unit(k)
        largest = (q @ k.T).abs().max() / temperature if len(q) and len(k) else 0
        return 4 * (float(largest) + q.shape[1] ** 0.5)

    def terms(q, k):
        """One positive key of one key: the loss is 0, and its gradient what cancels."""
        if normalize:
            return tuple(2 / temperature / t.norm(dim=1, keepdim=True).clamp_min(1e-30) for t in (q, k))
        return tuple(2 / temperature * t.norm(dim=1).max() * torch.ones(()) for t in (k, q))

    return ProductOp(
        call(oodkern.info_nce),
        call(reference.info_nce),
        eager,
        [(square if symmetric else pair)(*sizes) for sizes in (SQUARE if symmetric else SIZES)],
        make=square if symmetric else pair,
        order=1,
        scale=1.0,
        condition=condition,
        terms=terms,
        bytes_per_row=24,  # the logsumexp of rows and columns
        waits=not symmetric,
        raw_products=raw_products,
    )


class ContrastBar(ProductBar):
    test_nan_stays_in_its_row = None  # gradients of keys, and the keys' direction, are sums over queries


class TestInfoNCE(ContrastBar):
    op = op(raw_products=raw(False))


class TestUnnormalized(ContrastBar):
    op = op(normalize=False, temperature=3.0)


class TestSymmetric(ContrastBar):
    op = op(symmetric=True, raw_products=raw(True))


class TestLabelled(ContrastBar):
    op = op(labelled=True, raw_products=raw(False, labelled=True))


class TestSymmetricLabelled(ContrastBar):
    op = op(symmetric=True, labelled=True, normalize=False, temperature=2.0)
    test_workspace_is_bounded = None  # labels add to neither direction: TestSymmetric and TestLabelled


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_temperature_has_a_gradient(dtype, symmetric, labelled):
    q, k = torch.randn(40, 16).to(dtype), torch.randn(40, 16).to(dtype)
    temperature = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))
    target, positives = (None, labels_of(q, k)) if labelled else (target_of(q, k), None)

    def loss(function):
        return lambda t, a, b: function(a, b, target, t, True, symmetric, positives)

    results = value_and_gradients(loss(oodkern.info_nce), [temperature, q, k])
    exact = in_float64(loss(reference.info_nce), [temperature, q, k])
    assert results[1].shape == ()
    torch.testing.assert_close(results[1].double(), exact[1], rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    for a, b in zip(results[2:], exact[2:], strict=True):
        tolerance = 4 * torch.finfo(dtype).eps + 1e-12
        assert ((a.double() - b).abs().max() / b.abs().max()) < max(tolerance, 1e-12)
    # A tensor of one element, and alone.
    one = torch.full((1,), 0.3, dtype=temperature.dtype, requires_grad=True)
    value = oodkern.info_nce(q, k, target, one, True, symmetric, positives)
    (gradient,) = torch.autograd.grad(value, one, like(value))
    torch.testing.assert_close(gradient, results[1].reshape(1), rtol=1e-6, atol=0)


def test_is_cross_entropy_of_the_scores():
    q, k, target = torch.randn(30, 8), torch.randn(50, 8), torch.randint(0, 50, (30,))
    scores = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / 0.07
    expected = torch.nn.functional.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close(oodkern.info_nce(q, k, target, 0.07), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
class TestEdges:
    @pytest.fixture(autouse=True)
    def demand(self, backend):
        with oodkern.backend(backend):
            yield

    def test_rows_of_zeros(self, backend):
        q, k = torch.randn(6, 4), torch.randn(6, 4)
        q[1], k[2] = 0, 0
        q, k = q.requires_grad_(), k.requires_grad_()
        value = oodkern.info_nce(q, k, torch.arange(6), symmetric=True)
        dq, dk = torch.autograd.grad(value, (q, k), like(value))
        assert value.isfinite().all()
        assert (dq[1] == 0).all()
        assert (dk[2] == 0).all()
        assert dq.isfinite().all()

    def test_nothing_is_positive(self, backend):
        q, k = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
        value = oodkern.info_nce(q, k, None, positives=(torch.zeros(3).long(), torch.ones(5).long()))
        assert (value == 0).all()
        assert (torch.autograd.grad(value, q, like(value))[0] == 0).all()

    def test_labels_of_any_integer_dtype(self, backend):
        q, k = torch.randn(4, 3), torch.randn(6, 3)
        labels = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 2, 0, 1, 2])
        expected = oodkern.info_nce(q, k, None, positives=labels)
        for dtype in (torch.int32, torch.int16, torch.uint8):
            positives = (labels[0].to(dtype), labels[1].to(dtype))
            assert torch.equal(oodkern.info_nce(q, k, None, positives=positives), expected)

    def test_radial_gradients_vanish(self, backend):
        """Normalised rows count by their direction alone."""
        q, k = torch.randn(20, 8, dtype=torch.float64, requires_grad=True), torch.randn(30, 8, dtype=torch.float64)
        value = oodkern.info_nce(q, k, target_of(q, k))
        (gradient,) = torch.autograd.grad(value, q, like(value))
        assert ((gradient * q).sum(1).abs() < 1e-12).all()


def test_nan_of_a_query_stays_in_its_loss():
    q, k = torch.randn(6, 5), torch.randn(9, 5)
    clean = oodkern.info_nce(q, k, target_of(q, k))
    q[2, 1] = torch.nan
    value = oodkern.info_nce(q, k, target_of(q, k))
    assert value.isnan().nonzero().flatten().tolist() == [2]
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(value[others], clean[others])


def test_rejects_what_it_cannot_compute():
    q, k, target = torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"keys: expected 4 rows as queries have, since symmetric, got 5"):
        oodkern.info_nce(q, k, target, symmetric=True)
    with pytest.raises(ValueError, match=r"target: expected keys in 0\.\.4, got 5"):
        oodkern.info_nce(q, k, target + 5)
    with pytest.raises(ValueError, match=r"target: expected keys in 0\.\.4, got -1"):
        oodkern.info_nce(q, k, target - 1)
    with pytest.raises(ValueError, match=r"target: expected \[4\], one number a row, got \[3\]"):
        oodkern.info_nce(q, k, target[:3])
    with pytest.raises(TypeError, match="target: expected integers, got float32"):
        oodkern.info_nce(q, k, target.float())
    with pytest.raises(TypeError, match=r"target: expected a torch\.Tensor, got NoneType"):
        oodkern.info_nce(q, k, None)
    with pytest.raises(ValueError, match="target: expected None beside positives"):
        oodkern.info_nce(q, k, target, positives=(target, torch.zeros(5).long()))
    with pytest.raises(TypeError, match="positives: expected labels of the queries and labels of the keys"):
        oodkern.info_nce(q, k, None, positives=target)
    with pytest.raises(ValueError, match=r"positives\[1\]: expected \[5\]"):
        oodkern.info_nce(q, k, None, positives=(target, target))
    for temperature in (0.0, -1.0, float("nan"), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            oodkern.info_nce(q, k, target, temperature)
    with pytest.raises(ValueError, match="temperature: expected a number or a floating tensor of one element"):
        oodkern.info_nce(q, k, target, torch.ones(2))


def test_the_product_is_formed_once_for_the_value_and_once_for_all_gradients():
    q, k = torch.randn(600, 32, requires_grad=True), torch.randn(600, 32, requires_grad=True)
    with Products((600, 600, 32)) as products:
        value = oodkern.info_nce(q, k, torch.arange(600), symmetric=True)
    assert products.count == 1
    with Products((600, 600, 32)) as products:
        torch.autograd.grad(value, (q, k), like(value))
    assert products.count == 3


def test_key_gradients_by_slice():
    """16-bit sums of 9 MB are added up slice by slice: each tile is formed twice, and counts once for T."""
    q, k, temperature = torch.randn(1500, 700).half(), torch.randn(6500, 700).half(), torch.tensor(0.3)

    def loss(function):
        return lambda q, k, t: function(q, k, target_of(q, k), t)

    ours = value_and_gradients(loss(oodkern.info_nce), [q, k, temperature])
    exact = in_float64(loss(reference.info_nce), [q, k, temperature])
    for a, b, tolerance in zip(ours, exact, (1e-5, 2e-3, 2e-3, 1e-4), strict=True):
        assert ((a.double() - b).abs().max() / b.abs().max()) < tolerance
    assert ((ours[2].double() * k.double()).sum(1).abs() < 2e-3 * exact[2].norm(dim=1) * k.double().norm(dim=1)).all()
