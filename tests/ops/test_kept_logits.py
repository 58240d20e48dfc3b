"""Logits that stay from a score to its gradients where they are few, and become their slopes."""

import itertools

import pytest
import torch
from layouts import FLOATS
from multiplications import Products, multiplies_bfloat16
from oracle import like, memory_events

import oodkern
from oodkern import _native, reference

SCORES = {
    "energy": (oodkern.linear_energy, reference.linear_energy, 1.0),
    "energy, T = 0.37": (oodkern.linear_energy, reference.linear_energy, 0.37),
    "joint energy": (
        lambda x, w, b, _: oodkern.linear_joint_energy(x, w, b),
        lambda x, w, b, _: reference.linear_joint_energy(x, w, b),
        1.0,
    ),
}
# Several waves; several slices; few rows of many classes; and no row at all.
SHAPES = [(4200, 7, 130), (300, 65, 1100), (33, 64, 3000), (5, 20, 60_000), (1, 1, 1), (0, 3, 4), (3, 4, 0)]
MOST = 16 << 20


def inputs(shape, dtype, with_bias=True):
    N, D, K = shape
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator) for size in ((N, D), (K, D), (K,)))
    leaves = [x.to(dtype), (w * D**-0.5).to(dtype), b.to(dtype) if with_bias else None]
    return [leaf if leaf is None else leaf.requires_grad_() for leaf in leaves]


def is_kept(dtype):
    """Not what is widened before it is multiplied."""
    return dtype != torch.float16 and (dtype != torch.bfloat16 or multiplies_bfloat16())


def gradients(name, leaves, formed_anew=False):
    """And how many products they took."""
    x, w, b = leaves
    function, _, temperature = SCORES[name]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    with Products((len(x), x.shape[1], len(w))) as products:
        if formed_anew:
            with torch.autograd.graph.save_on_cpu():  # nothing is kept that these hooks do not see
                value = function(x, w, b, temperature)
        else:
            value = function(x, w, b, temperature)
        found = torch.autograd.grad(value, wanted, like(value))
    return found, products.count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_the_same_numbers_with_a_product_less(name, with_bias, shape, dtype):
    """Those of logits that are formed again, which are held to float64 elsewhere."""
    leaves = inputs(shape, dtype, with_bias)
    ours, count = gradients(name, leaves)
    again, more = gradients(name, leaves, formed_anew=True)
    for a, b in zip(ours, again, strict=True):
        # Tiles of other sizes are added up in another order.
        scale = b.abs().max() if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * float(scale)
        )
    if 0 in shape:
        assert count == more == 0
    else:
        assert more == 4
        assert count == (3 if is_kept(dtype) else 4)


@pytest.mark.parametrize("instructions", _native.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_instruction_set(instructions, dtype):
    with _native.instruction_set(instructions):
        for name in SCORES:
            leaves = inputs((300, 65, 1100), dtype)
            for a, b in zip(gradients(name, leaves)[0], gradients(name, leaves, formed_anew=True)[0], strict=True):
                eps = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(a, b, rtol=eps, atol=eps * float(b.abs().max()))


@pytest.mark.parametrize("learns", list(itertools.product((False, True), repeat=3))[1:])
def test_who_learns(learns):
    leaves = [
        leaf.detach().requires_grad_(needed)
        for leaf, needed in zip(inputs((50, 20, 30), torch.float64), learns, strict=True)
    ]
    ours, count = gradients("energy", leaves)
    assert count == 1 + learns[0] + learns[1]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    exact = reference.linear_energy(*leaves)
    for a, b in zip(ours, torch.autograd.grad(exact, wanted, like(exact)), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCORES)
def test_a_second_backward_pass(name):
    """Formed anew: the first made slopes of the logits."""
    shape = (50, 20, 30)
    leaves = inputs(shape, torch.float64)
    function, exact, temperature = SCORES[name]
    value = function(*leaves, temperature)
    for seed, expected in ((1, 2), (2, 3), (3, 3)):
        g = like(value, seed=seed)
        with Products(shape) as products:
            ours = torch.autograd.grad(value, leaves, g, retain_graph=True)
        assert products.count == expected
        oracle = torch.autograd.grad(exact(*leaves, temperature), leaves, g)
        for a, b in zip(ours, oracle, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("N", "K", "dtype", "kept"), [
    (4096, 1000, torch.float32, True),
    (4200, 1000, torch.float32, False),
    (2000, 1000, torch.float64, True),
    (4096, 1000, torch.float64, False),
    (1900, 1000, torch.bfloat16, True),
    (4096, 1000, torch.bfloat16, False),
    (7000, 19, torch.float32, True),
    (8000, 19, torch.float32, False),
])  # fmt: skip
def test_how_many_are_kept(N, K, dtype, kept):
    """Never more than 16 MiB, from the forward to the backward pass and within either."""
    kept = kept and is_kept(dtype)
    leaves = inputs((N, 16, K), dtype)
    assert gradients("energy", leaves)[1] == (3 if kept else 4)
    forward = memory_events(lambda: oodkern.linear_energy(*leaves))
    value = oodkern.linear_energy(*leaves)
    results = sum(leaf.nbytes for leaf in leaves)
    backward = memory_events(lambda: torch.autograd.grad(value, leaves, like(value)))
    held = N * (K + 16) * (8 if dtype == torch.float64 else 4) if kept else 0
    assert held <= max(itertools.accumulate(forward)) <= MOST
    assert held + max(itertools.accumulate(backward)) - results - 8 * N <= MOST


def test_a_second_derivative():
    leaves = inputs((6, 5, 7), torch.float64)
    g = like(leaves[0][:, 0]).requires_grad_()

    def gradient(x, w, b, g):
        return torch.autograd.grad(oodkern.linear_energy(x, w, b), (x, w, b), g, create_graph=True)

    assert torch.autograd.gradcheck(gradient, (*leaves, g))


def test_where_they_are_not_kept():
    """Nothing learns; no graph is recorded; tensors are saved elsewhere; the reference."""
    leaves = inputs((50, 20, 300), torch.float32)

    def held_after_forward(*leaves):
        values = []
        held = sum(memory_events(lambda: values.append(oodkern.linear_energy(*leaves))))
        return held - values[0].nbytes

    assert held_after_forward(*leaves) >= 50 * 316 * 4
    assert held_after_forward(*(leaf.detach() for leaf in leaves)) == 0
    with torch.no_grad():
        assert held_after_forward(*leaves) == 0
    with torch.autograd.graph.save_on_cpu(), Products((50, 20, 300)) as products:
        value = oodkern.linear_energy(*leaves)
        torch.autograd.grad(value, leaves, like(value))
    assert products.count == 4
    with oodkern.backend("reference"), Products((50, 20, 300)) as products:
        oodkern.linear_energy(*leaves)
    assert products.count == 0


def test_other_threads_in_the_backward_pass():
    """bfloat16 sums of 8 MB are added up slice by slice, of one wave, which has rows for each thread."""
    leaves = inputs((600, 1000, 2000), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        value = oodkern.linear_energy(*leaves)
        expected = torch.autograd.grad(oodkern.linear_energy(*leaves), leaves, like(value))
        torch.set_num_threads(1)
        found = torch.autograd.grad(value, leaves, like(value))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * float(b.abs().max()))


def test_opcheck():
    raw = torch.ops.oodkern
    for dtype in (torch.float64, torch.float32):
        x, w, b = (leaf.detach() for leaf in inputs((5, 3, 4), dtype))
        torch.library.opcheck(raw.linear_score_kept.default, ("energy", x, w, b, 1.0))
        value, logits = raw.linear_score_kept("energy", x, w, b, 1.0)
        arguments = ("energy", like(value), logits, x, w, b, value, 1.0, True, True, True)
        # Not traced and compared: it runs twice on the same logits, which are slopes the second time.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(raw.linear_score_backward_kept.default, arguments, test_utils=checks)
        with pytest.raises(RuntimeError, match="logits: expected those of linear_score_kept"):
            raw.linear_score_backward_kept("energy", like(value), logits[:, 1:], *arguments[3:])
        with pytest.raises(RuntimeError, match="logits: expected those of linear_score_kept"):
            raw.linear_score_backward_kept("energy", like(value), logits.t().contiguous().t(), *arguments[3:])
