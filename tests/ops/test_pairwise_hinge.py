"""The pairwise hinge: what all pairs would give, from sorting."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import FLOATS
from oracle import allocations, in_float64, like, value_and_gradients
from pairs import all_pairs, scores
from pairs import judge_hinge as check

import oodkern
from oodkern import _native, reference

# Either side the smaller one; powers of two and their neighbours, where the search has one step more; more than the
# 64 searches that go side by side and the 4,096 scores of a chunk.
SIZES = [(5, 3), (3, 5), (1, 1), (1, 70), (70, 1), (7, 65), (64, 9000), (9000, 63), (128, 127), (300, 257)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("margin", [0.0, 0.5, -1.0, 100.0, -100.0])
def test_against_all_pairs(dtype, margin):
    for seed, (N, M) in enumerate(SIZES):
        check(scores(N, M, dtype, seed), margin)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(dtype):
    for name, (N, M) in itertools.product(_native.instruction_sets(), ((300, 5000), (5000, 300))):
        with _native.instruction_set(name):
            check(scores(N, M, dtype), 0.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1e4, -3e4, 1e6])
def test_far_from_zero(dtype, offset):
    """Differences of large scores: sums of the scores themselves would leave nothing of them."""
    if dtype == torch.float16 and offset > 5e4:
        offset = 5e4
    check(scores(200, 3000, dtype, offset=offset), 0.5)
    check(scores(3000, 200, dtype, offset=offset), 0.5)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ties_and_layouts(data):
    """Few values, so that many pairs are at the hinge itself, where the slope is 0."""
    dtype = data.draw(st.sampled_from(FLOATS))
    values = data.draw(st.sampled_from(((-1.0, 0.0, 1.0), (0.5, 0.25, -0.0, 0.0), (1000.0, 1000.5), (3.0,))))
    pair = []
    for _ in range(2):
        drawn = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=40))
        tensor = torch.tensor(drawn, dtype=dtype)
        kind = data.draw(st.sampled_from(("dense", "every other", "offset", "expanded")))
        if kind == "every other":
            tensor = torch.stack([tensor, tensor + 7], 1)[:, 0]
        if kind == "offset":
            tensor = torch.cat([tensor, tensor])[len(tensor) :]
        if kind == "expanded":
            tensor = tensor[:1].expand(len(tensor))
        pair.append(tensor)
    check(pair, data.draw(st.sampled_from((0.0, 0.5, 1.0, -1.0, 0.25, 0.1))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sign_of_a_pair_is_exact(dtype):
    """Scores one unit in the last place above, at and below the other less the margin."""
    for margin in (0.0, 0.1, 0.3, -0.7, 1e-30, 1e-46, -1e-46, 3e7):
        base = torch.cat([torch.randn(200, dtype=dtype), torch.tensor([0.0, -0.0, 1e-40, -1e-40], dtype=dtype)])
        at = (base.double() + margin).to(dtype)
        for id_score in (at, torch.nextafter(at, at + 1), torch.nextafter(at, at - 1)):
            for one, other in zip(id_score, base, strict=True):
                leaves = [one[None].clone().requires_grad_(), other[None].clone().requires_grad_()]
                gradient = torch.autograd.grad(oodkern.pairwise_hinge(*leaves, margin), leaves)
                active = float(other) + margin > float(one)  # in float64
                assert [g.item() for g in gradient] == ([-1.0, 1.0] if active else [0.0, 0.0])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_part_keeps_the_graph(sizes, dtype, backend):
    with oodkern.backend(backend):
        leaves = [tensor.requires_grad_() for tensor in scores(*sizes, dtype)]
        value = oodkern.pairwise_hinge(*leaves, 1.0)
    assert value.requires_grad
    assert value == 0
    for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("flip", [False, True])
def test_infinities_and_nan(dtype, flip):
    inf, nan = math.inf, math.nan
    cases = [
        ([1.0, inf], [0.0, 2.0]), ([1.0, 2.0], [0.0, -inf]), ([1.0, -inf], [0.0, 2.0]), ([1.0, 2.0], [inf, 0.0]),
        ([inf, inf], [0.0, 2.0]), ([inf, 1.0], [inf, 0.0]), ([-inf, 1.0], [-inf, 0.0]), ([-inf, inf], [1.0, 2.0]),
        ([nan, 1.0], [0.0, 2.0]), ([1.0, 2.0], [0.0, nan]), ([-inf], [-inf]), ([inf], [-inf]), ([-inf], [inf]),
    ]  # fmt: skip
    for a, b in cases:
        # Either part the larger one.
        id_score, ood_score = (a * 3, b) if flip else (a, b * 3)
        pair = [torch.tensor(part, dtype=dtype) for part in (id_score, ood_score)]
        ours = value_and_gradients(lambda x, y: oodkern.pairwise_hinge(x, y, 0.5), pair)
        exact = in_float64(lambda x, y: all_pairs(x, y, 0.5), pair)
        torch.testing.assert_close(ours[0].double(), exact[0], equal_nan=True)
        if exact[0].isnan():
            assert all(gradient.isnan().all() for gradient in ours[1:])
            continue
        for x, y in zip(ours[1:], exact[1:], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=0)


def test_any_subset_requires_gradients():
    full = value_and_gradients(oodkern.pairwise_hinge, pair := scores(30, 20, torch.float32))
    for chosen in itertools.product((False, True), repeat=2):
        leaves = [t.clone().requires_grad_(flag) for t, flag in zip(pair, chosen, strict=True)]
        value = oodkern.pairwise_hinge(*leaves)
        assert torch.equal(value, full[0])
        assert value.requires_grad == any(chosen)
        for leaf, gradient in zip(leaves, full[1:], strict=True):
            if leaf.requires_grad:
                assert torch.equal(torch.autograd.grad(value, leaf, like(value), retain_graph=True)[0], gradient)


def test_opcheck():
    op = torch.ops.oodkern.pairwise_hinge.default
    for dtype, sizes in itertools.product((torch.float32, torch.float64), ((5, 7), (7, 5), (0, 3), (3, 0), (1, 1))):
        a, b = scores(*sizes, dtype)
        torch.library.opcheck(op, (a, b, 0.5))
        torch.library.opcheck(op, (torch.stack([a, a], 1)[:, 0], b, 0.5))
    for wrong in (
        scores(3, 3, torch.float16),
        [torch.ones(2, 2), torch.ones(2)],
        [torch.ones(2), torch.ones(2).long()],
    ):
        with pytest.raises(RuntimeError, match="_score: expected"):
            op(*wrong, 0.0)


def test_compile_fullgraph():
    torch._dynamo.reset()

    def loss(a, b):
        return oodkern.pairwise_hinge(a, b, 0.4)

    compiled = torch.compile(loss, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        pair = scores(20, 30, dtype)
        for a, b in zip(value_and_gradients(compiled, pair), value_and_gradients(loss, pair), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    dynamic = torch.compile(oodkern.pairwise_hinge, fullgraph=True, dynamic=True)
    for sizes, margin in (((5, 6), 0.3), ((7, 9), 0.5), ((12, 4), 2.5)):
        pair = scores(*sizes, torch.float32)
        assert torch.equal(dynamic(*pair, margin), oodkern.pairwise_hinge(*pair, margin))


def test_func_grad_and_vmap():
    id_score, ood_score = scores(8, 11, torch.float64)
    many = torch.stack([id_score, id_score * 0.5, id_score + 1.0])
    own = torch.stack([ood_score, ood_score - 1.0, ood_score * 2.0], 1)
    both = torch.func.grad(lambda a, b: oodkern.pairwise_hinge(a, b).sin(), (0, 1))
    shared, apart = torch.func.vmap(both, in_dims=(0, None))(many, ood_score), torch.func.vmap(both, (0, 1))(many, own)
    for i in range(3):
        for gradients, second in ((shared, ood_score), (apart, own[:, i])):
            leaves = [many[i].clone().requires_grad_(), second.clone().requires_grad_()]
            expected = torch.autograd.grad(all_pairs(*leaves).sin(), leaves)
            for a, b in zip(gradients, expected, strict=True):
                torch.testing.assert_close(a[i], b)


def test_forward_mode_raises():
    id_score, ood_score = scores(4, 5, torch.float64)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda a: oodkern.pairwise_hinge(a, ood_score), (id_score,), (like(id_score),))


def test_saved_tensor_hooks():
    pair = scores(6, 7, torch.float64)
    expected, packed = value_and_gradients(oodkern.pairwise_hinge, pair), set()

    def pack(tensor):
        packed.add(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        again = value_and_gradients(oodkern.pairwise_hinge, pair)
    assert packed == {(6,), (7,)}
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


def test_same_bits_for_any_number_of_threads():
    pair = scores(3000, 50_000, torch.float32, offset=1e3)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(oodkern.pairwise_hinge, pair))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_of_the_size_of_the_pairs():
    pair = [t.requires_grad_() for t in scores(3000, 40_000, torch.float32)]
    held = allocations(lambda: torch.autograd.grad(oodkern.pairwise_hinge(*pair), pair))
    assert 0 < sum(held) <= 4 * 43_000 * 4


def test_autocast_takes_mixed_dtypes_without_rounding():
    id_score, ood_score = scores(9, 8, torch.float32)
    half = id_score.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = oodkern.pairwise_hinge(half, ood_score, 0.5)
    assert value.dtype == torch.float32
    assert torch.equal(value, oodkern.pairwise_hinge(half.float(), ood_score, 0.5))
    assert torch.autograd.grad(value, half)[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="ood_score: expected bfloat16 as id_score are, got float32"):
        oodkern.pairwise_hinge(half, ood_score)


@pytest.mark.parametrize("N", [30, 3000])
def test_reference_in_blocks(N):
    """3,000 x 5,000 pairs are several blocks."""
    pair = scores(N, 5000, torch.float64)
    ours = value_and_gradients(lambda a, b: reference.pairwise_hinge(a, b, 0.2), pair)
    exact = in_float64(lambda a, b: all_pairs(a, b, 0.2), pair)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    with oodkern.backend("reference"):
        torch.testing.assert_close(oodkern.pairwise_hinge(*pair, 0.2), exact[0])


def test_rejects_what_it_cannot_compute():
    a, b = torch.randn(3), torch.randn(4)
    with pytest.raises(TypeError, match=r"id_score: expected a torch\.Tensor, got list"):
        oodkern.pairwise_hinge([1.0], b)
    with pytest.raises(TypeError, match=r"ood_score: expected one of .* got int64"):
        oodkern.pairwise_hinge(a, b.long())
    with pytest.raises(ValueError, match=r"ood_score: expected \[M\], one number a sample, got \[2, 2\]"):
        oodkern.pairwise_hinge(a, b.view(2, 2))
    with pytest.raises(ValueError, match=r"id_score: expected \[N\]"):
        oodkern.pairwise_hinge(a[0], b)
    with pytest.raises(TypeError, match="expected float32 as id_score are, got float64"):
        oodkern.pairwise_hinge(a, b.double())
    with pytest.raises(ValueError, match="expected on cpu, where"):
        oodkern.pairwise_hinge(a, b.to("meta"))
    for margin in ("1", None, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="margin: expected a number, got"):
            oodkern.pairwise_hinge(a, b, margin)
    for margin in (math.inf, math.nan):
        with pytest.raises(ValueError, match="margin: expected a finite number"):
            oodkern.pairwise_hinge(a, b, margin)
    with oodkern.backend("triton"), pytest.raises(RuntimeError, match="cannot compute `pairwise_hinge` on cpu"):
        oodkern.pairwise_hinge(a, b)
