"""Convolutions whose second derivatives use the kernels of first ones, against PyTorch's own, differentiated twice."""

import contextlib

import pytest
import torch
from oracle import like
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oodkern.ops._convolution import TwiceDifferentiable

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def leaves_of(dims=2, groups=1, kernel=3, channels=(16, 24), size=11, dtype=torch.float64):
    """A batch, a weight, a bias."""
    torch.manual_seed(dims)
    sides = range(size, size - dims, -1)
    kernels = [kernel] * dims if isinstance(kernel, int) else kernel
    shapes = (2, channels[0], *sides), (channels[1], channels[0] // groups, *kernels), channels[1:]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def is_ours(y):
    return y.grad_fn.name() == "ConvolutionBackward"  # PyTorch's own end in 0


def derivatives(function, leaves, ours, order=2):
    """The values, and all derivatives up to an order, of all that the last ones depend on, with random cotangents."""
    torch.manual_seed(7)
    with TwiceDifferentiable() if ours else contextlib.nullcontext():
        last = [function(*leaves)]
    assert is_ours(last[0]) == ours
    every, of = list(last), list(leaves)
    for _ in range(order):
        last = [one for one in last if one.requires_grad]
        upstream = [like(one).requires_grad_() for one in last]
        of += upstream
        last = torch.autograd.grad(last, of, upstream, create_graph=True, allow_unused=True, materialize_grads=True)
        every += last
    return every


def check(function, leaves, order=2, tolerance=1e-10):
    ours, theirs = (derivatives(function, leaves, ours, order) for ours in (True, False))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert any(one.abs().max() > 0.1 for one in theirs[2 + len(leaves) :])  # of second order


class Counted(TorchDispatchMode):
    """The output masks of the convolution gradients that are formed inside: in the input, in the weight."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1][:2]))
        return func(*args, **(kwargs or {}))


class TestDerivatives:
    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("groups", [1, 2, 16])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "padding": 1},
            {"dilation": 2, "padding": "same"},
            {"padding": "valid", "stride": 2},
            {"stride": (3,), "padding": [2], "dilation": (2,)},
        ],
        ids=str,
    )
    def test_all(self, dims, groups, options):
        channels = (16, 32) if groups > 2 else (16, 24)
        kernel = (3, 3, 1)[:dims] if groups == 16 else 3  # depthwise: 9 at most
        leaves = leaves_of(dims, groups, kernel, channels)
        check(lambda *leaves: FUNCTIONS[dims](*leaves, groups=groups, **options), leaves)

    def test_sides_of_their_own(self):
        leaves = leaves_of(kernel=(5, 2))
        check(lambda x, w, b: F.conv2d(x, w, b, (2, 1), (0, 3), (1, 2), 1), leaves)

    def test_keywords(self):
        leaves = leaves_of()
        check(lambda x, w, b: F.conv2d(bias=b, weight=w, input=x, padding=1), leaves)

    def test_no_bias(self):
        check(lambda x, w: F.conv2d(x, w), leaves_of()[:2])

    def test_frozen_bias(self):
        x, w, b = leaves_of()
        check(lambda x, w: F.conv2d(x, w, b.detach()), [x, w])

    def test_what_is_no_leaf(self):
        check(lambda x, w, b: F.conv2d(x.sin(), w.cos(), b.exp()), leaves_of())

    def test_a_weight_used_twice(self):
        x, w, b = leaves_of(channels=(16, 16))
        check(lambda x, w, b: F.conv2d(F.conv2d(x, w, b, 1, 1).relu_(), w, b), [x, w, b])

    def test_reflected_padding(self):
        module = nn.Conv2d(16, 24, 3, padding=2, padding_mode="reflect").double()
        x = leaves_of()[0]
        check(lambda x, w, b: torch.func.functional_call(module, {"weight": w, "bias": b}, x), leaves_of(), order=2)
        assert x.shape[1] == 16

    def test_channels_last(self):
        x, w, b = leaves_of()
        last = [one.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for one in (x, w)]
        check(lambda x, w, b: F.conv2d(x, w, b, 2), [*last, b])

    def test_third_order(self):
        check(lambda x, w, b: F.conv2d(x, w, b, 2, 1), leaves_of(size=9), order=3)

    def test_gradgradcheck(self):
        leaves = [one.detach()[:, :8].requires_grad_() if one.dim() > 1 else one for one in leaves_of(size=5)]
        with TwiceDifferentiable():
            assert torch.autograd.gradgradcheck(lambda *leaves: F.conv2d(*leaves, padding=1), leaves, fast_mode=True)


class TestOnlyWhatIsAskedFor:
    """Of a node that could have gradients in its input, weight and bias."""

    @pytest.mark.parametrize("leaf", [True, False])
    def test_first_order(self, leaf):
        x, w, b = leaves_of()
        tensors = (x, w, b) if leaf else (x.sin(), w.sin(), b.sin())
        with TwiceDifferentiable():
            y = F.conv2d(*tensors)
        assert is_ours(y)
        for of, mask in (((0,), (True, False)), ((1,), (False, True)), ((0, 1), (True, True)), ((2,), None)):
            for create_graph in (True, False):
                with Counted() as counted:
                    inputs = [(x, w, b)[i] for i in of]
                    torch.autograd.grad(y, inputs, like(y), retain_graph=True, create_graph=create_graph)
                assert counted.masks == ([] if mask is None else [mask])
        with Counted() as counted:
            y.backward(like(y), inputs=[w], retain_graph=True)
            assert counted.masks == [(False, True)]
            y.backward(like(y))
            assert counted.masks == [(False, True), (True, True)]

    def test_second_order(self):
        x, w, b = leaves_of()
        with TwiceDifferentiable():
            y = F.conv2d(x, w, b)
        g = like(y).requires_grad_()
        (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
        for of, masks in ((g, []), (w, [(False, True)])):
            with Counted() as counted:
                torch.autograd.grad(gx, of, like(gx), retain_graph=True)
            assert counted.masks == masks
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(gx, x, like(gx), retain_graph=True)


class TestLeftToPyTorch:
    """Calls whose results, graphs and errors are PyTorch's own."""

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize(
        "call",
        [
            lambda x, w, b: F.conv2d(x[0], w, b),
            lambda x, w, b: F.conv2d(x, w.detach(), b),
            lambda x, w, b: F.conv2d(x.detach(), w, b),
            lambda x, w, b: F.conv2d(x, w[..., :2], b, padding="same"),
            lambda x, w, b: F.conv2d(x[..., :3, :3], w, b),
            lambda x, w, b: F.conv2d(x[:, :8], w[:, :4], b, groups=2),
            lambda x, w, b: F.conv2d(x, w[:16, :1].repeat(1, 1, 2, 2), b[:16], groups=16),
            lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b),
            lambda x, w, b: F.conv2d(x.bfloat16(), w.bfloat16(), b.bfloat16(), padding=0, stride=2),
            lambda x, w, b: F.conv2d(x.to(torch.complex128), w.to(torch.complex128), b.to(torch.complex128)),
        ],
    )
    def test_by_shape(self, call):
        leaves = leaves_of()
        with TwiceDifferentiable():
            y = call(*leaves)
        assert not is_ours(y)
        assert torch.equal(y, call(*leaves))

    @pytest.mark.parametrize(
        "call",
        [
            lambda x, w, b: F.conv2d(x, w, b, 0),
            lambda x, w, b: F.conv2d(x, w, b, -1),
            lambda x, w, b: F.conv2d(x, w, b, 1, -1),
            lambda x, w, b: F.conv2d(x, w, b, 1, 0, 0),
            lambda x, w, b: F.conv2d(x, w, b, (1, 1, 1)),
            lambda x, w, b: F.conv2d(x, w, b, 1.5),
            lambda x, w, b: F.conv2d(x, w, b, padding="some"),
            lambda x, w, b: F.conv2d(x, w, b, 2, padding="same"),
            lambda x, w, b: F.conv2d(x, w, b, groups=3),
            lambda x, w, b: F.conv2d(x, w, b, groups=0),
            lambda x, w, b: F.conv2d(x, w, b[1:]),
            lambda x, w, b: F.conv2d(x, w.float(), b),
            lambda x, w, b: F.conv2d(x, w, b.float()),
            lambda x, w, b: F.conv2d(x[:, 1:], w, b),
            lambda x, w, b: F.conv2d(x[..., :2], w, b),
            lambda x, w, b: F.conv2d(x, w, b, width=1),
            lambda x, w, b: F.conv2d(x),
            lambda x, w, b: F.conv2d(x.tolist(), w, b),
        ],
    )
    def test_errors(self, call):
        leaves = leaves_of()
        with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
            call(*leaves)
        with pytest.raises(type(theirs.value)) as ours, TwiceDifferentiable():
            call(*leaves)
        assert str(ours.value) == str(theirs.value)

    def test_no_grad(self):
        with TwiceDifferentiable(), torch.no_grad():
            assert not F.conv2d(*leaves_of()).requires_grad

    def test_subclasses(self):
        class Sub(torch.Tensor):
            pass

        x, w, b = leaves_of()
        with TwiceDifferentiable():
            assert type(F.conv2d(x.as_subclass(Sub), w, b)) is Sub

    def test_function_transforms(self):
        x, w, b = leaves_of()
        v = like(w)

        def function(w):
            return F.conv2d(x, w, b, padding=1).sin().sum()

        def both(call):
            expected = call()
            with TwiceDifferentiable():
                torch.testing.assert_close(call(), expected)

        both(lambda: torch.func.grad(function)(w))
        both(lambda: torch.func.jvp(function, (w,), (v,)))
        both(lambda: torch.func.vmap(lambda one: F.conv2d(one[None], w, b))(x))

        def dual():
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(w, v))).tangent

        both(dual)

    def test_compiled(self):
        torch._dynamo.reset()
        x, w, b = leaves_of(dtype=torch.float32)
        compiled = torch.compile(lambda *leaves: F.conv2d(*leaves).sin(), backend="aot_eager")
        for mode in (contextlib.nullcontext(), TwiceDifferentiable(), TwiceDifferentiable()):
            with mode:
                y = compiled(x, w, b)
            torch.testing.assert_close(y, F.conv2d(x, w, b).sin())
            torch.testing.assert_close(
                torch.autograd.grad(y.sum(), w), torch.autograd.grad(F.conv2d(x, w, b).sin().sum(), w)
            )
