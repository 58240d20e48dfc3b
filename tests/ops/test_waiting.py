"""Gradients of features alone, which are formed with the score and wait for their upstream."""

import itertools

import pytest
import torch
from layouts import FLOATS
from multiplications import Products, multiplies_bfloat16
from oracle import assert_two_sided, like, memory_events

import oodkern
from oodkern import _native, reference


def of_head(function):
    return lambda x, w, b: function(x, w, b)


def of_weight(function):
    return lambda x, w, b: function(x, w)


SCORES = {
    "energy": (of_head(oodkern.linear_energy), of_head(reference.linear_energy)),
    "energy, T = 0.37": (
        lambda x, w, b: oodkern.linear_energy(x, w, temperature=0.37),
        lambda x, w, b: reference.linear_energy(x, w, None, 0.37),
    ),
    "joint energy": (of_head(oodkern.linear_joint_energy), of_head(reference.linear_joint_energy)),
    "alignment": (of_weight(oodkern.alignment), of_weight(reference.alignment)),
}
# Several waves; several slices of classes; classes enough for 16 bits and too few.
SHAPES = [(4200, 7, 130), (300, 65, 1100), (33, 64, 3000), (50, 20, 30), (1, 1, 1), (0, 3, 4), (3, 4, 0)]


def inputs(shape, dtype):
    N, D, K = shape
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator) for size in ((N, D), (K, D), (K,)))
    return x.to(dtype).requires_grad_(), (w * D**-0.5).to(dtype), b.to(dtype)


def against_float64(name, shape, dtype):
    """The gradient against the oracle; how many products it took."""
    function, exact = SCORES[name]
    x, w, b = inputs(shape, dtype)
    with Products(shape) as products:
        value = function(x, w, b)
        (ours,) = torch.autograd.grad(value, x, like(value))
    y = x.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(exact(y, w.double(), b.double()), y, like(value).double())
    learns = w.detach().requires_grad_()
    (formed_anew, _) = torch.autograd.grad(function(x, learns, b), (x, learns), like(value))
    assert (ours.dtype, ours.shape) == (dtype, x.shape)
    typical = oracle.square().mean().sqrt() if oracle.numel() else 0.0
    # Slopes are rounded to bfloat16 before they are multiplied on.
    condition = 256 + 2**16 * (dtype == torch.bfloat16)
    size = oracle.abs() + typical
    if name == "alignment":  # the part along a row is taken out: in one dimension nothing is left
        size = size + like(value).double().abs()[:, None] / y.detach().norm(dim=1, keepdim=True).clamp_min(1e-30)
    assert_two_sided(ours, oracle, formed_anew, "gradient", rows=True, size=size, condition=condition)
    return products.count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORES)
def test_gradients(name, shape, dtype):
    few_for_16_bits = shape[2] < 128 and dtype.itemsize == 2
    # bfloat16 logits are kept where they are multiplied as they are.
    kept = name != "alignment" and dtype == torch.bfloat16 and multiplies_bfloat16()
    formed_again = few_for_16_bits and not kept
    count = against_float64(name, shape, dtype)
    assert count == (0 if 0 in shape else 3 if formed_again else 2)


@pytest.mark.parametrize("instructions", _native.instruction_sets())
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(instructions, dtype):
    with _native.instruction_set(instructions):
        for name in SCORES:
            against_float64(name, (300, 65, 1100), dtype)


@pytest.mark.parametrize("name", SCORES)
def test_a_second_backward_pass(name):
    """Formed anew: whatever became of the first, and not from an upstream that was multiplied in already."""
    shape = (50, 20, 30)
    x, w, b = inputs(shape, torch.float64)
    value = SCORES[name][0](x, w, b)
    for seed, expected in ((1, 0), (2, 2), (3, 2)):
        g = like(value, seed=seed)
        with Products(shape) as products:
            (ours,) = torch.autograd.grad(value, x, g, retain_graph=True)
        assert products.count == expected
        (oracle,) = torch.autograd.grad(SCORES[name][1](x, w, b), x, g)
        assert torch.allclose(ours, oracle, rtol=1e-9, atol=1e-12)
        ours.zero_()  # the caller's own


@pytest.mark.parametrize("name", ["energy", "joint energy"])
def test_a_second_derivative(name):
    x, w, b = inputs((6, 5, 7), torch.float64)
    g = like(x[:, 0]).requires_grad_()

    def gradient(x, g):
        return torch.autograd.grad(SCORES[name][0](x, w, b), x, g, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, (x, g))


@pytest.mark.parametrize("name", SCORES)
def test_batched_upstreams(name):
    x, w, b = inputs((50, 20, 30), torch.float64)
    upstreams = torch.stack([like(x[:, 0], seed=seed) for seed in (1, 2)])
    (ours,) = torch.autograd.grad(SCORES[name][0](x, w, b), x, upstreams, is_grads_batched=True)
    for a, g in zip(ours, upstreams, strict=True):
        assert torch.allclose(a, torch.autograd.grad(SCORES[name][1](x, w, b), x, g)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_where_it_does_not_wait(name):
    """No gradient is wanted, or that of the weight too; tensors are saved elsewhere; the reference."""
    shape = (50, 20, 30)
    x, w, b = inputs(shape, torch.float32)

    def products_of_forward(*tensors):
        with Products(shape) as products:
            SCORES[name][0](*tensors)
        return products.count

    assert products_of_forward(x, w, b) == 2
    assert products_of_forward(x.detach(), w, b) == 1
    assert products_of_forward(x, w.clone().requires_grad_(), b) == 1
    if name == "energy":
        assert products_of_forward(x, w, b.clone().requires_grad_()) == 1
    with torch.no_grad():
        assert products_of_forward(x, w, b) == 1
    with torch.autograd.graph.save_on_cpu():
        assert products_of_forward(x, w, b) == 1
    with oodkern.backend("reference"):
        assert products_of_forward(x, w, b) == 0


@pytest.mark.parametrize("name", SCORES)
def test_a_row_of_nan_or_of_zeros_keeps_to_itself(name):
    x, w, b = inputs((300, 65, 1100), torch.float32)
    g = like(x[:, 0])
    (clean,) = torch.autograd.grad(SCORES[name][0](x, w, b), x, g)
    dirty = x.detach().clone()
    dirty[7] = torch.nan
    dirty[9] = 0
    (ours,) = torch.autograd.grad(SCORES[name][0](dirty.requires_grad_(), w, b), dirty, g)
    others = [i for i in range(300) if i not in (7, 9)]
    assert torch.equal(ours[others], clean[others])
    assert ours[7].isnan().all()
    assert ours[9].isfinite().all()


def test_rows_of_logits_that_are_too_long():
    """Their slopes are not known before the whole row is: three products."""
    assert against_float64("energy", (130, 3, 150_000), torch.float32) == 3
    assert against_float64("alignment", (130, 3, 150_000), torch.float32) == 2


def test_workspace():
    """Beyond what it was given and the score, the gradient in the score's dtype and less than 16 MiB."""
    N, D, _ = shape = (6000, 64, 1500)
    for name, dtype in itertools.product(("energy", "alignment"), (torch.float32, torch.bfloat16)):
        x, w, b = inputs(shape, dtype)
        held = memory_events(lambda name=name, x=x, w=w, b=b: SCORES[name][0](x, w, b))
        assert 4 * N * D <= max(itertools.accumulate(held)) <= 4 * N * D + (16 << 20)
        value = SCORES[name][0](x, w, b)
        held = memory_events(lambda value=value, x=x: torch.autograd.grad(value, x, like(value)))
        assert max(itertools.accumulate(held)) <= x.nbytes * (dtype == torch.bfloat16) + 32 * N


def test_opcheck():
    for dtype, shape in itertools.product(FLOATS, ((5, 3, 4), (0, 3, 4))):
        x, w, b = (t.detach() for t in inputs(shape, dtype))
        torch.library.opcheck(torch.ops.oodkern.alignment_foreseen.default, (x, w))
        arguments = ("energy", x, w, b, 1.0, None, None, None, True, False, False)
        torch.library.opcheck(torch.ops.oodkern.linear_score_foreseen.default, arguments)
    with pytest.raises(RuntimeError, match="linear: expected one, but for the features alone"):
        torch.ops.oodkern.linear_score_foreseen("energy", x, w, b, 1.0, None, None, None, True, True, False)
