"""Room `heads`, beside its numbers: autograd, torch.func, torch.compile, layouts, arguments."""

import pytest
import torch
from oracle import like
from room_heads import FLOATS, HEADS, MARGIN, gradient_of, labels, random
from torch.autograd import gradcheck

import oodkern
from oodkern import reference

RAW = {"oe": "oe", "energy in": "energy_in", "energy out": "energy_out", "bce": "bce"}


@pytest.fixture(params=HEADS)
def head(request):
    return request.param


@pytest.fixture
def function(head):
    return HEADS[head]


class TestAutograd:
    def test_gradcheck(self, function):
        for shape in ((3, 5), (2, 3, 4)):
            assert gradcheck(function, [random(shape, torch.float64).requires_grad_()], check_batched_grad=True)

    def test_reference_gradcheck(self, function):
        with oodkern.backend("reference"):
            z = random((3, 5), torch.float64).requires_grad_()
            assert gradcheck(function, [z])
            assert torch.autograd.gradgradcheck(function, [z])
            half = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(oodkern.bce_head(half, torch.tensor([[0, 1, 0]])).sum(), half)
        torch.testing.assert_close(gradient, torch.tensor([[1, -1, 1]]).double() / 6)

    def test_second_derivative(self, head, function):
        z = random((3, 5), torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        name = head.split()[0]
        with pytest.raises(RuntimeError, match=rf"oodkern\.{name}_head can be differentiated once"):
            gradient.sum().backward()

    def test_func_grad_and_vmap(self, function):
        z = random((4, 6, 5), torch.float64)
        expected = gradient_of(function, z, torch.ones(4, 6).double())
        one = torch.func.grad(lambda t: function(t).sum())
        torch.testing.assert_close(one(z), expected)
        torch.testing.assert_close(torch.func.vmap(one)(z), expected)
        torch.testing.assert_close(torch.func.vmap(one, in_dims=1, out_dims=1)(z), expected)
        torch.testing.assert_close(torch.func.vmap(torch.func.vmap(one))(z), expected)
        jacobian = torch.func.jacrev(function)(z[0])
        torch.testing.assert_close(jacobian, torch.diag_embed(expected[0].T).permute(1, 2, 0).contiguous())

    def test_vmap_over_targets(self):
        z, y = random((6, 5)), torch.rand(3, 6, 5) < 0.5
        batched = torch.func.vmap(oodkern.bce_head, in_dims=(None, 0))(z, y)
        assert torch.equal(batched, torch.stack([oodkern.bce_head(z, one) for one in y]))

    def test_forward_mode_raises(self, function):
        z = random((2, 3))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            torch.func.jvp(function, (z,), (z,))

    def test_saved_tensor_hooks(self, function):
        z, grad = random((5, 9), torch.bfloat16), like(torch.empty(5))
        expected = gradient_of(function, z, grad)
        packed = []

        def pack(tensor):
            packed.append(tensor)
            return tensor.clone().T.contiguous().T if tensor.dim() == 2 else tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
            assert torch.equal(gradient_of(function, z, grad), expected)
            torch.testing.assert_close(gradient_of(function, z.float(), grad), gradient_of(function, z.float(), grad))
        assert packed

    def test_checkpoint(self, function):
        z = random((5, 9)).requires_grad_()
        value = torch.utils.checkpoint.checkpoint(lambda t: function(t * 2), z, use_reentrant=False)
        expected = torch.autograd.grad(function(z * 2).sum(), z)[0]
        assert torch.equal(torch.autograd.grad(value.sum(), z)[0], expected)

    def test_compile_fullgraph(self, function):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True)
        for dtype in (torch.float32, torch.bfloat16):
            z, grad = random((6, 33), dtype), like(torch.empty(6))
            assert torch.equal(compiled(z), function(z))
            leaf = z.clone().requires_grad_()
            function(leaf).backward(grad, create_graph=True)  # formed in the backward pass, as compiled
            assert torch.equal(gradient_of(compiled, z, grad), leaf.grad)

    def test_autocast(self, function):
        weight = torch.eye(8, requires_grad=True)
        x = random((6, 8))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                z = x @ weight
                value = function(z)
            assert (z.dtype, value.dtype) == (dtype, torch.float32)
            assert torch.equal(value, function(z.detach()))
            (gradient,) = torch.autograd.grad(value, weight, like(value))
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(head, dtype):
    ops, name = torch.ops.oodkern, RAW[head]
    for z in (random((5, 7), dtype), random((2, 3, 4), dtype).transpose(0, 2), random((0, 7), dtype)):
        target = labels(z) if head == "bce" else None
        value, rows, _ = ops.head(name, z, target, MARGIN, None)
        for upstream in (None, like(value)):
            torch.library.opcheck(ops.head.default, (name, z, target, MARGIN, upstream))
        torch.library.opcheck(ops.head_backward.default, (name, like(value), z, target, MARGIN, rows))
        mended = (name, torch.empty(z.shape, dtype=dtype), like(value), 2 * like(value), z, target, MARGIN, rows)
        torch.library.opcheck(ops.head_mend.default, mended)


@pytest.mark.parametrize("dtype", FLOATS)
class TestRows:
    def test_empty_and_single(self, head, function, dtype):
        for shape in ((0, 5), (0, 0), (3, 0), (1, 1), (1, 5), (4, 0, 5), (5,), (1,)):
            z = random(shape, dtype).requires_grad_()
            value = function(z)
            assert value.shape == shape[:-1]
            (gradient,) = torch.autograd.grad(value, z, like(value))
            assert gradient.shape == shape
            with oodkern.backend("reference"):
                expected = function(z.detach().double())
            torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=1e-5)

    def test_strides_are_seen(self, function, dtype):
        base = random((6, 9, 34), dtype)
        for view in (
            base[:, :, ::2], base[::2], base[:, 1], base.transpose(0, 1), base.transpose(1, 2), base[1:, 2:, 3:],
            base[:1].expand(5, 9, 34), base[..., :1].expand(6, 9, 7), base[0, 0],
        ):  # fmt: skip
            dense = view.clone(memory_format=torch.contiguous_format)
            assert torch.equal(function(view), function(dense))
            grad = like(function(dense))
            for g in (grad, grad.sum().expand(grad.shape)):
                told = {"upstream": g} if g is grad else {}
                expected = gradient_of(function, dense, g, **told)
                assert torch.equal(gradient_of(function, view, g, **told), expected)

    def test_nan_stays_in_its_row(self, function, dtype):
        z, grad = random((5, 1500), dtype), like(torch.empty(5, dtype=torch.promote_types(dtype, torch.float32)))
        clean = function(z), gradient_of(function, z, grad)
        z[2, 1400] = torch.nan
        dirty = function(z), gradient_of(function, z, grad)
        others = torch.tensor([0, 1, 3, 4])
        assert dirty[0][2].isnan()
        assert dirty[1][2, 1400].isnan()
        for a, b in zip(dirty, clean, strict=True):
            assert torch.equal(a[others], b[others])

    def test_repeats_bit_for_bit_whatever_the_threads(self, function, dtype):
        z = random((257, 1000), dtype)
        grad = like(function(z))
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (threads, threads, 1, 3):
                torch.set_num_threads(count)
                results.append((function(z), gradient_of(function, z, grad)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))


def test_other_devices_take_the_reference(function):
    z = torch.empty(5, 7, dtype=torch.bfloat16, device="meta", requires_grad=True)
    value = function(z) if function is not HEADS["bce"] else oodkern.bce_head(z, torch.empty_like(z).detach())
    assert (value.shape, value.dtype, value.device.type) == ((5,), torch.float32, "meta")
    assert torch.autograd.grad(value.sum(), z)[0].dtype == torch.bfloat16


def test_rejects_what_it_cannot_compute():
    z = torch.randn(4, 5)
    for function in HEADS.values():
        with pytest.raises(TypeError, match=r"logits: expected one of .* got int64"):
            function(z.long())
        with pytest.raises(ValueError, match="without dimensions"):
            oodkern.oe_head(torch.tensor(1.0))
    with pytest.raises(ValueError, match="side: expected 'in' or 'out', got 'ID'"):
        oodkern.energy_head(z, -7.0, "ID")
    for margin in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="margin: expected a finite number"):
            oodkern.energy_head(z, margin, "in")
    for margin in ("1", None, True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="margin: expected a number, got"):
            oodkern.energy_head(z, margin, "in")
    with pytest.raises(TypeError, match=r"target: expected a torch\.Tensor, got list"):
        oodkern.bce_head(z, [1])
    with pytest.raises(ValueError, match=r"target: expected \[4, 5\] as logits are, got \[4\]"):
        oodkern.bce_head(z, torch.ones(4))
    with pytest.raises(TypeError, match="target: expected bool, integers or a floating dtype of logits, got complex64"):
        oodkern.bce_head(z, torch.ones(4, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match="target: expected on cpu, where logits are, got meta"):
        oodkern.bce_head(z, torch.ones(4, 5, device="meta"))
    with pytest.raises(ValueError, match="target: expected a tensor that requires no gradient"):
        oodkern.bce_head(z, torch.ones(4, 5, requires_grad=True))


def test_raw_ops_guard_their_memory():
    ops, z = torch.ops.oodkern, torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="head: expected oe, energy_in, energy_out or bce, got ce"):
        ops.head("ce", z, None, 0.0, None)
    with pytest.raises(RuntimeError, match="target: goes with head bce"):
        ops.head("oe", z, z, 0.0, None)
    with pytest.raises(RuntimeError, match="target: goes with head bce"):
        ops.head("bce", z, None, 0.0, None)
    with pytest.raises(RuntimeError, match="target: expected the shape of logits"):
        ops.head("bce", z, z[:3], 0.0, None)
    with pytest.raises(RuntimeError, match="upstream: expected one number per row"):
        ops.head("oe", z, None, 0.0, torch.ones(3))
    with pytest.raises(RuntimeError, match="grad: expected one number per row"):
        ops.head_backward("oe", torch.ones(3), z, None, 0.0, torch.ones(4, 3))
    gradient, one = torch.empty(4, 5), torch.ones(4)
    for wrong in (gradient[:3], gradient.double(), torch.empty(5, 4).T):
        with pytest.raises(RuntimeError, match="gradient: expected"):
            ops.head_mend("oe", wrong, one, one, z, None, 0.0, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="foreseen: expected one number per row"):
        ops.head_mend("oe", gradient, one, one[:3], z, None, 0.0, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="rows: expected what the head gave"):
        ops.head_backward("oe", torch.ones(4), z, None, 0.0, torch.ones(4, 2))


def test_reference_knows_the_heads():
    z, y = random((6, 11), torch.float64), labels(torch.empty(6, 11)).double()
    torch.testing.assert_close(reference.oe_head(z), z.logsumexp(-1) - z.mean(-1))
    torch.testing.assert_close(reference.energy_head(z, -3.0, "in"), (3.0 - z.logsumexp(-1)).relu().square())
    torch.testing.assert_close(reference.energy_head(z, -3.0, "out"), (z.logsumexp(-1) - 3.0).relu().square())
    exact = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(-1)
    torch.testing.assert_close(reference.bce_head(z, y), exact)
