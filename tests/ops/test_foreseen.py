"""Scores whose gradients are formed with them: what comes back is compared with what was foreseen."""

import itertools

import pytest
import torch
from multiplications import Products, multiplies_bfloat16
from oracle import assert_two_sided, like, memory_events
from torch._subclasses.fake_tensor import FakeTensorMode

import oodkern
from oodkern import Upstream, _native, reference

SCORES = {
    "energy": (oodkern.linear_energy, reference.linear_energy),
    "joint_energy": (oodkern.linear_joint_energy, reference.linear_joint_energy),
}
# Few rows; several waves; whole rows of many classes; weights whose 16-bit gradients need sums that do not fit.
SHAPES = [(7, 33, 12), (4200, 3, 5), (300, 65, 1100), (2100, 5, 3000), (1100, 1700, 1024), (0, 3, 4), (1, 1, 1)]
LONG = [(130, 3, 150_000), (66, 80, 150_000)]  # rows of logits so long that waves hold slices of them
SHAPES += LONG
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def head(shape, dtype, seed=0):
    N, D, K = shape
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(size, generator=generator) for size in ((N, D), (K, D), (K,)))
    return [tensor.to(dtype).requires_grad_() for tensor in (x, w * D**-0.5, b)]


def foresee(score, hinges=True):
    """Random slopes, and margins near the scores, so that hinges of both signs act on some rows; none on others."""
    score = score.detach()
    if not hinges:
        return Upstream(like(score))
    hinge = like(score, seed=1) * (like(score, seed=2) > 0)
    return Upstream(like(score), hinge, score + like(score, seed=3))


def slope(upstream, score):
    """Its values, by autograd of the loss that it is the slope of."""
    leaf = score.detach().requires_grad_()
    loss = (upstream.linear * leaf).sum()
    if upstream.hinge is not None:
        off = (leaf - upstream.margin) * upstream.hinge.sign()
        loss = loss + (upstream.hinge.abs() * off.relu().square()).sum()
    return torch.autograd.grad(loss, leaf)[0]


def are_kept(shape, dtype):
    """Whether bfloat16 slopes have room in the weight's gradient, and there are products of bfloat16."""
    return shape == LONG[1] and dtype == torch.bfloat16 and multiplies_bfloat16()


def gradients_against_float64(score, shape, dtype, upstream_of, factor):
    function, exact = SCORES[score]
    leaves = head(shape, dtype)
    plain = function(*leaves)
    upstream = upstream_of(plain)
    with Products(shape) as products:
        value = function(*leaves, upstream=upstream)
        g = factor * slope(upstream, value)
        ours = torch.autograd.grad(value, leaves, g)
    assert torch.allclose(value, plain, rtol=4 * torch.finfo(value.dtype).eps)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = torch.autograd.grad(exact(*doubles), doubles, g.double())
    # Slopes that are kept are rounded before they are added up too, and slopes of one column have one sign.
    terms = torch.autograd.grad(exact(*doubles), doubles[2], g.double().abs())[0].abs() * are_kept(shape, dtype)
    # Slopes are rounded to bfloat16 before they are multiplied on.
    condition = 64 + 2**16 * (dtype == torch.bfloat16)
    for i, (a, b, c) in enumerate(zip(ours, oracle, torch.autograd.grad(plain, leaves, g), strict=True)):
        assert a.dtype == dtype
        typical = b.square().mean().sqrt() if b.numel() else 0.0
        size = b.abs() + typical + terms if b.dim() == 1 else b.abs() + typical
        assert_two_sided(a, b, c, f"gradient {i}", rows=b.dim() == 2, size=size, condition=condition)
    return products.count


@pytest.mark.parametrize("hinges", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_gradients(score, shape, dtype, hinges):
    count = gradients_against_float64(score, shape, dtype, lambda s: foresee(s, hinges), 1.0)
    assert count == (0 if shape[0] == 0 else 4 if shape in LONG and not are_kept(shape, dtype) else 3)


@pytest.mark.parametrize("score", SCORES)
def test_classes_that_cannot_be(score):
    """A bias of -inf: slopes of whole slices of classes are 0, whatever comes after them."""
    x, w, b = head(LONG[1], torch.bfloat16)
    with torch.no_grad():
        b[:3000] = b[-3000:] = -torch.inf
    g = like(torch.empty(LONG[1][0]))
    ours = torch.autograd.grad(SCORES[score][0](x, w, b, upstream=Upstream(g)), (x, w, b), g)
    plain = torch.autograd.grad(SCORES[score][0](x, w, b), (x, w, b), g)
    for a, c in zip(ours, plain, strict=True):
        assert c.isfinite().all()
        assert (a - c).abs().max() <= 2**-7 * c.abs().max()
    assert (ours[2][:3000] == 0).all()


@pytest.mark.parametrize("name", _native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(name, dtype):
    with _native.instruction_set(name):
        gradients_against_float64("energy", (300, 65, 1100), dtype, foresee, 1.0)


@pytest.mark.parametrize(("dtype", "factor", "expected"), [
    (torch.float32, 0.3, 3), (torch.float32, -4.0, 3), (torch.float32, 0.0, 3), (torch.float32, 65536.0, 3),
    (torch.bfloat16, 0.25, 3), (torch.bfloat16, 0.3, 6),  # scaled, it would be rounded a second time
])  # fmt: skip
def test_factors(dtype, factor, expected):
    assert gradients_against_float64("energy", (300, 65, 110), dtype, foresee, factor) == expected


@pytest.mark.parametrize("how", ["one row", "all rows", "nan", "nothing foreseen"])
def test_what_was_not_foreseen_is_formed_anew(how):
    shape = (50, 20, 30)
    x, w, b = head(shape, torch.float32)
    upstream = Upstream(like(torch.empty(50)) * (how != "nothing foreseen"))
    g = like(torch.empty(50), seed=5) if how == "all rows" else like(torch.empty(50))
    if how == "one row":
        g[7] *= 1 + 1e-5
    if how == "nan":
        upstream.linear[3] = torch.nan
    with Products(shape) as products:
        ours = torch.autograd.grad(oodkern.linear_energy(x, w, b, upstream=upstream), (x, w, b), g)
    assert products.count == 6  # three with the scores, three anew
    for a, c in zip(ours, torch.autograd.grad(oodkern.linear_energy(x, w, b), (x, w, b), g), strict=True):
        assert torch.equal(a, c)


def test_roundings_of_terms_are_no_difference():
    """Where linear and hinge cancel, the slope is as exact as its terms: autograd's sum is another rounding."""
    x, w, b = head((400, 20, 30), torch.float32)
    plain = oodkern.linear_energy(x, w, b).detach()
    hinge = torch.full_like(plain, 1 / 3)
    upstream = Upstream(-2 * hinge * 0.7, hinge, plain - 0.7)
    g = upstream.linear + 2 * hinge * (plain - upstream.margin).relu()
    assert 0 < g.abs().max() < 1e-5
    with Products((400, 20, 30)) as products:
        torch.autograd.grad(oodkern.linear_energy(x, w, b, upstream=upstream), (x, w, b), g)
    assert products.count == 3


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_any_subset(wanted):
    shape = (50, 20, 30)
    leaves = [leaf.requires_grad_(want) for leaf, want in zip(head(shape, torch.float32), wanted, strict=True)]
    upstream = Upstream(like(torch.empty(50)))
    to = [leaf for leaf in leaves if leaf.requires_grad]
    with Products(shape) as products:
        ours = torch.autograd.grad(oodkern.linear_energy(*leaves, upstream=upstream), to, upstream.linear)
    assert products.count == 1 + wanted[0] + wanted[1]
    everything = [leaf.detach().requires_grad_() for leaf in leaves]
    plain = torch.autograd.grad(oodkern.linear_energy(*everything), everything, upstream.linear)
    for a, b in zip(ours, (b for b, want in zip(plain, wanted, strict=True) if want), strict=True):
        assert torch.equal(a, b)


def test_twice_and_through():
    """A second backward pass and a second derivative are those of the plain score, whatever became of the first."""
    x, w, b = head((50, 20, 30), torch.float64)
    g = like(torch.empty(50)).double()
    value = oodkern.linear_energy(x, w, b, upstream=Upstream(g))
    plain = torch.autograd.grad(oodkern.linear_energy(x, w, b), (x, w, b), g)
    first = torch.autograd.grad(value, (x, w, b), g, retain_graph=True)
    for gradient in first:
        gradient.zero_()  # the caller's own
    for a, c in zip(torch.autograd.grad(value, (x, w, b), g, retain_graph=True), plain, strict=True):
        assert torch.allclose(a, c, rtol=1e-12)

    def second(**options):
        formed = torch.autograd.grad(oodkern.linear_energy(x, w, b, **options), (x, w, b), g, create_graph=True)
        return torch.autograd.grad(formed, (x, w, b), [like(t) for t in formed])

    for a, c in zip(second(upstream=Upstream(g)), second(), strict=True):
        assert torch.allclose(a, c, rtol=1e-12)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: oodkern.linear_energy(*leaves, upstream=Upstream(g)), (x, w, b), atol=1e-6
    )


def test_parameters_keep_what_they_were_given():
    """Accumulated gradients do not share memory with one another or with the graph."""
    x, w, b = head((50, 20, 30), torch.float32)
    g = like(torch.empty(50))
    plain = torch.autograd.grad(oodkern.linear_energy(x, w, b), w, g)[0]
    value = oodkern.linear_energy(x, w, b, upstream=Upstream(g))
    value.backward(g, retain_graph=True)
    value.backward(g)
    assert torch.equal(w.grad, 2 * plain)


def test_where_nothing_can_be_foreseen():
    """float16, no gradients wanted, torch.func, torch.compile, the reference: the plain score."""
    shape = (50, 20, 30)
    x, w, b = head(shape, torch.float32)
    g = like(torch.empty(50))
    plain = torch.autograd.grad(oodkern.linear_energy(x, w, b), x, g)[0]
    upstream = Upstream(g)
    with torch.no_grad(), Products(shape) as products:
        oodkern.linear_energy(x, w, b, upstream=upstream)
    assert products.count == 1
    halves = head(shape, torch.float16)
    with Products(shape) as products:
        oodkern.linear_energy(*halves, upstream=upstream)
    assert products.count == 1
    with torch.autograd.graph.save_on_cpu(), Products(shape) as products:
        oodkern.linear_energy(x, w, b, upstream=upstream)
    assert products.count == 1
    w, b = w.detach(), b.detach()

    def total(x):
        return (oodkern.linear_energy(x, w, b, upstream=upstream) * g).sum()

    assert torch.allclose(torch.func.grad(total)(x.detach()), plain, atol=1e-6)
    one = torch.func.vmap(
        torch.func.grad(lambda row: oodkern.linear_energy(row[None], w, b, upstream=Upstream(g[:1]))[0])
    )
    assert torch.allclose(one(x.detach()) * g[:, None], plain, atol=1e-6)
    compiled = torch.compile(total, fullgraph=True)
    assert torch.allclose(torch.autograd.grad(compiled(x), x)[0], plain, atol=1e-6)
    batched = torch.autograd.grad(total(x), x, torch.tensor([1.0, 3.0]), is_grads_batched=True)[0]
    assert torch.allclose(batched, torch.stack([plain, 3 * plain]), atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert torch.autograd.grad(total(fake), fake)[0].shape == x.shape
    with oodkern.backend("reference"):
        assert torch.allclose(torch.autograd.grad(total(x), x)[0], plain, atol=1e-5)


def test_workspace():
    """Beyond arguments, results and gradients less than 16 MiB, also for whole rows of many classes."""
    for shape, dtype in itertools.product([(600, 64, 20_000), *LONG], (torch.float32, torch.bfloat16)):
        leaves = head(shape, dtype)
        g = like(torch.empty(shape[0]))
        sizes = sum(t.numel() * t.element_size() for t in leaves)
        held = memory_events(lambda leaves=leaves, g=g: oodkern.linear_energy(*leaves, upstream=Upstream(g)))
        assert max(itertools.accumulate(held)) <= sizes + (16 << 20)


@pytest.mark.parametrize(("upstream", "message"), [
    (Upstream(torch.zeros(3)), r"upstream.linear: expected \[5\] of float32.*got \[3\] of float32"),
    (Upstream(torch.zeros(5).double()), r"upstream.linear: expected \[5\] of float32.*got \[5\] of float64"),
    (Upstream(torch.zeros(5), torch.zeros(5)), "upstream: expected hinge and margin together"),
    (Upstream(torch.zeros(5), torch.zeros(5), torch.zeros(5, 1)), r"upstream.margin: expected \[5\]"),
])  # fmt: skip
def test_rejects_what_it_cannot_use(upstream, message):
    with pytest.raises(ValueError, match=message):
        oodkern.linear_energy(torch.randn(5, 3), torch.randn(4, 3, requires_grad=True), upstream=upstream)


@pytest.mark.parametrize("upstream", [torch.ones(5), Upstream(1.0)])
def test_rejects_what_is_no_upstream(upstream):
    with pytest.raises(TypeError, match=r"upstream.*: expected .* got (Tensor|float)"):
        oodkern.linear_energy(torch.randn(5, 3), torch.randn(4, 3, requires_grad=True), upstream=upstream)


def test_opcheck():
    x, w, b = (t.detach() for t in head((5, 3, 4), torch.float32))
    g = like(torch.empty(5))
    for rest in ((None, None), (g, g)):
        for needs in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                torch.ops.oodkern.linear_score_foreseen.default, ("energy", x, w, b, 1.0, g, *rest, *needs)
            )
