"""InfoNCE's gradients, which are formed with the losses and wait for the number that they are multiplied by."""

import itertools

import pytest
import torch
from layouts import FLOATS
from multiplications import Products
from ops.test_contrast import labels_of, target_of
from oracle import assert_two_sided, like

import oodkern
from oodkern import _native, reference

# Several waves; several slices of classes, were it not for whole rows; keys enough for 16 bits and too few.
SHAPES = [(4200, 7, 130), (300, 65, 1100), (33, 64, 3000), (50, 20, 30), (1, 1, 1), (0, 3, 4)]
EVEN, BY_ROW = "one number", "a number a row"


def inputs(shape, dtype, labelled=False):
    """Queries, keys, temperature, and what says who is positive."""
    N, D, M = shape
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(size, D, generator=generator).to(dtype) for size in (N, M))
    temperature = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32))
    return (q, k, temperature), (None, labels_of(q, k)) if labelled else (target_of(q, k), None)


def loss_of(function, who, normalize=True):
    return lambda q, k, t: function(q, k, who[0], t, normalize, False, who[1])


def upstream_of(value, kind):
    return like(value[:1]).expand(value.shape) if kind == EVEN and len(value) else like(value)


def learning(tensors, learns):
    return [one.detach().clone().requires_grad_(needed) for one, needed in zip(tensors, learns, strict=True)]


def gradients(function, tensors, kind, learns):
    tensors = learning(tensors, learns)
    value = function(*tensors)
    return torch.autograd.grad(value, [one for one in tensors if one.requires_grad], upstream_of(value, kind))


def against_float64(shape, dtype, kind=EVEN, learns=(True, True, True), **which):
    """The gradients against the oracle; how many products they took."""
    labelled, normalize = which.get("labelled", False), which.get("normalize", True)
    tensors, who = inputs(shape, dtype, labelled)
    with Products(shape) as products:
        ours = gradients(loss_of(oodkern.info_nce, who, normalize), tensors, kind, learns)
    exact = loss_of(reference.info_nce, who, normalize)
    oracle = gradients(exact, [one.double() for one in tensors], kind, learns)
    plain = gradients(exact, tensors, kind, learns)
    likes = [one for one, needed in zip(tensors, learns, strict=True) if needed]
    for a, b, c, one in zip(ours, oracle, plain, likes, strict=True):
        assert (a.dtype, a.shape) == (one.dtype, one.shape)
        if one.dim() == 0:
            torch.testing.assert_close(a.double(), b, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=1e-12)
            continue
        typical = b.square().mean().sqrt() if b.numel() else 0.0
        # Slopes are rounded to bfloat16 before they are multiplied on; in one dimension nothing is left of a direction.
        size = b.abs() + typical + (shape[1] == 1)
        condition = 256 + 2**16 * (dtype == torch.bfloat16)
        assert_two_sided(a, b, c, "gradient", rows=True, size=size, condition=condition)
    return products.count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("labelled", [False, True])
def test_of_a_mean(labelled, shape, dtype):
    few_for_16_bits = shape[2] < 128 and dtype.itemsize == 2
    count = against_float64(shape, dtype, labelled=labelled, normalize=not labelled)
    assert count == (0 if 0 in shape else 4 if few_for_16_bits else 3)


@pytest.mark.parametrize(
    ("learns", "kind", "count"),
    [
        ((True, False, False), EVEN, 2),
        ((True, False, False), BY_ROW, 2),
        ((False, True, False), EVEN, 2),
        ((False, True, False), BY_ROW, 2 + 2),
        ((False, False, True), EVEN, 1),
        ((True, True, False), BY_ROW, 3 + 2),
        ((True, False, True), BY_ROW, 2 + 1),
        ((True, True, True), BY_ROW, 3 + 2),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_who_learns(dtype, learns, kind, count):
    assert against_float64((300, 65, 1100), dtype, kind, learns) == count


@pytest.mark.parametrize("instructions", _native.instruction_sets())
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(instructions, dtype):
    with _native.instruction_set(instructions):
        against_float64((300, 65, 1100), dtype)


def test_rows_of_scores_that_are_too_long():
    """Their slopes are not known before the whole row is."""
    assert against_float64((130, 3, 150_000), torch.float32) == 4


@pytest.mark.parametrize("kind", [EVEN, BY_ROW])
def test_a_second_backward_pass(kind):
    """Formed anew: whatever became of the first, and not from an upstream that was multiplied in already."""
    shape = (50, 20, 30)
    tensors, who = inputs(shape, torch.float64)
    tensors = learning(tensors, (True, True, True))
    value = loss_of(oodkern.info_nce, who)(*tensors)
    for turn in range(3):
        g = (turn + 1) * upstream_of(value, kind)
        with Products(shape) as products:
            ours = torch.autograd.grad(value, tensors, g, retain_graph=True)
        assert products.count == (3 if turn else 0 if kind == EVEN else 2)
        oracle = torch.autograd.grad(loss_of(reference.info_nce, who)(*tensors), tensors, g)
        for a, b in zip(ours, oracle, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            a.zero_()  # the caller's own


def test_an_upstream_that_is_not_a_number_for_all():
    """NaN is not equal to itself: gradients are formed anew, and are NaN."""
    tensors, who = inputs((5, 4, 6), torch.float32)
    tensors = learning(tensors, (True, True, False))
    value = loss_of(oodkern.info_nce, who)(*tensors)
    assert all(g.isnan().any() for g in torch.autograd.grad(value.sum() * torch.nan, tensors[:2]))


def test_batched_upstreams():
    tensors, who = inputs((50, 20, 30), torch.float64)
    tensors = learning(tensors, (True, True, True))
    upstreams = torch.stack([like(tensors[0][:, 0], seed=seed) for seed in (1, 2)])
    ours = torch.autograd.grad(
        loss_of(oodkern.info_nce, who)(*tensors), tensors, upstreams, is_grads_batched=True, retain_graph=True
    )
    for i, g in enumerate(upstreams):
        oracle = torch.autograd.grad(loss_of(reference.info_nce, who)(*tensors), tensors, g)
        for a, b in zip(ours, oracle, strict=True):
            assert torch.allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_where_they_do_not_wait():
    """No gradient is wanted; tensors are saved elsewhere; both directions; the reference."""
    shape = (50, 20, 30)
    tensors, who = inputs(shape, torch.float32)
    q, k, t = tensors

    def products_of_forward(q):
        with Products(shape) as products:
            oodkern.info_nce(q, k, who[0], t)
        return products.count

    learns = q.clone().requires_grad_()
    assert products_of_forward(learns) == 2
    assert products_of_forward(q) == 1
    with torch.no_grad():
        assert products_of_forward(learns) == 1
    with torch.autograd.graph.save_on_cpu():
        assert products_of_forward(learns) == 1
    with oodkern.backend("reference"):
        assert products_of_forward(learns) == 0
    with Products((50, 20, 50)) as products:
        oodkern.info_nce(learns, torch.randn(50, 20), torch.arange(50), t, symmetric=True)
    assert products.count == 1


def test_a_second_derivative_is_refused():
    tensors, who = inputs((5, 4, 6), torch.float32)
    tensors = learning(tensors, (True, True, False))
    value = loss_of(oodkern.info_nce, who)(*tensors)
    (gradient, _) = torch.autograd.grad(value.sum(), tensors[:2], create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce"):
        torch.autograd.grad(gradient.sum(), tensors[0])


def test_opcheck():
    for dtype, labelled, wanted in itertools.product(FLOATS, (False, True), ((True, True), (True, False))):
        (q, k, t), (target, labels) = inputs((5, 3, 4), dtype, labelled)
        arguments = (q, k, target, *(labels or (None, None)), t, True, *wanted)
        torch.library.opcheck(torch.ops.oodkern.info_nce_foreseen.default, arguments)
