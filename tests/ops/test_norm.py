"""Room `norm`: what is special to it; the rest is the bar's."""

import pytest
import torch
from bar import OpBar
from layouts import FLOATS
from op import Op
from oracle import allocations, assert_two_sided, in_float64, like, value_and_gradients
from room_norm import eager_norm, over_last
from threads import assert_shares_its_work

import oodkern
from oodkern import _native, reference

PIECE = 16_384  # rows are cut into pieces of so many elements


def forward(x):
    return (x,)


def backward(x):
    norm = torch.ops.oodkern.sample_norm(x)
    return like(norm), x, norm


def double_backward(x):
    return (like(x, seed=3), *backward(x))


RAW = [("sample_norm", forward), ("sample_norm_backward", backward), ("sample_norm_double_backward", double_backward)]
SHAPES = [
    ((3, 5),),
    ((2, 3, 4),),
    ((1, 1),),
    ((7, 1),),
    ((4, 17),),
    ((5, 1023),),
    ((3, 1025),),
    ((2, PIECE),),
    ((2, PIECE + 1),),
    ((33, 1000),),
]


class TestSampleNorm(OpBar):
    op = Op(over_last(oodkern.sample_norm), over_last(reference.sample_norm), eager_norm, SHAPES, RAW)


class TestReference:
    """The oracle itself, against PyTorch where PyTorch is right, in float64."""

    def test_value(self):
        x = torch.randn(50, 3, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(reference.sample_norm(x), x.flatten(1).norm(dim=1), rtol=1e-14, atol=0)

    def test_gradients(self):
        x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(reference.sample_norm, x)
        assert torch.autograd.gradgradcheck(reference.sample_norm, x)


def by_sample(x, order):
    """Value and derivatives of ours and of the oracle, samples flattened for judging."""
    ours = value_and_gradients(oodkern.sample_norm, [x], order)
    oracle = in_float64(reference.sample_norm, [x], order)
    for a, b in zip(ours, oracle, strict=True):
        yield tuple(t.flatten(1) if t.dim() > 1 else t for t in (a, b))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 5), (2, 3, 8, 8), (2, 2, 3, 4, 5), (0, 3, 2), (3, 0, 2)])
def test_any_number_of_dimensions(shape, dtype):
    x = like(torch.empty(shape, dtype=dtype), seed=1)
    # The second derivative of |x| is a difference of equal terms; that of nothing is not there.
    for a, b in by_sample(x, order=2 if x[0:1].numel() > 1 else 1):
        assert_two_sided(a, b, b, rows=a.dim() > 1, condition=16.0)


CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=CHANNELS_LAST),
        lambda x: x.contiguous(memory_format=CHANNELS_LAST)[::2],
        lambda x: x.contiguous(memory_format=CHANNELS_LAST)[1:, :, :, :],
        lambda x: x[:, :, 1:-1, 1:-1],
        lambda x: x[:, ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(6, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 5),
    ],
)
def test_layouts_of_images(view):
    x = view(like(torch.empty(6, 3, 8, 10), seed=2))
    leaf, dense = x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format).requires_grad_()
    assert leaf.stride() == x.stride()
    for upstream in (like(x[:, 0, 0, 0]), torch.ones(()).expand(len(x))):
        gradients = [torch.autograd.grad(oodkern.sample_norm(t), t, upstream)[0] for t in (leaf, dense)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for a, b in by_sample(x, order=2):
        assert_two_sided(a, b, b, rows=a.dim() > 1, condition=16.0)


def test_channels_last_is_read_in_place():
    """Neither the value nor the gradient copies images, and the gradient lies as they do."""
    x = torch.randn(4, 3, 64, 64).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    norm = oodkern.sample_norm(x)
    assert max(allocations(lambda: oodkern.sample_norm(x))) <= norm.nbytes
    (gradient,) = torch.autograd.grad(norm, x, like(norm), retain_graph=True)
    assert gradient.is_contiguous(memory_format=CHANNELS_LAST)
    made = allocations(lambda: torch.autograd.grad(norm, x, like(norm), retain_graph=True))
    assert sum(byte for byte in made if byte > gradient.nbytes // 64) <= gradient.nbytes


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_at_zero(dtype, backend):
    x = like(torch.empty(3, 5, dtype=dtype))
    x[1] = 0
    with oodkern.backend(backend):
        value, gradient, of_upstream, second = value_and_gradients(oodkern.sample_norm, [x], order=2)
    assert value[1] == 0
    for derivative in (gradient, of_upstream, second):
        assert (derivative[1] == 0).all()
        assert (derivative[0] != 0).all()
        assert derivative.isfinite().all()


@pytest.mark.parametrize("name", _native.instruction_sets())
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (1e-44, 1e-38, 1e-30, 1e-20, 1e18, 1e30, 3e37)),
        (torch.bfloat16, (1e-38, 1e-30, 1e18, 1e30, 3e37)),
        (torch.float64, (1e-300, 1e-170, 1e-154, 1e-140, 1e149, 1e153, 1e160, 1e306)),
        (torch.float16, (6e-8, 1e-5, 6e4)),
    ],
)
@pytest.mark.parametrize("columns", [40, PIECE + 700])
def test_squares_leave_the_range_and_norms_do_not(name, dtype, sizes, columns):
    """Value and gradient, of rows whose squares overflow or underflow; columns that are not zero are few."""
    x = torch.zeros(len(sizes), columns, dtype=torch.float64)
    x[:, :: columns // 10] = (
        like(x[:, :: columns // 10]).clamp(-1, 1) * torch.tensor(sizes, dtype=torch.float64)[:, None]
    )
    x = x.to(dtype)
    scaled = x.double() / torch.tensor(sizes, dtype=torch.float64)[:, None]  # within range
    with _native.instruction_set(name):
        norm, gradient = value_and_gradients(oodkern.sample_norm, [x])
    exact = scaled.norm(dim=1) * torch.tensor(sizes, dtype=torch.float64)
    assert_two_sided(norm, exact, exact)
    usual = norm >= torch.finfo(norm.dtype).tiny  # a norm with few bits left is exact to those
    assert usual.sum() >= len(sizes) - 1
    direction = like(norm).double()[:, None] * scaled / scaled.norm(dim=1, keepdim=True)
    assert_two_sided(gradient[usual], direction[usual], direction[usual], rows=True)


def test_second_derivative_of_small_and_large_rows():
    """||s x|| has second derivative 1 / s that of ||x||."""
    x = like(torch.empty(1, 50), seed=5)
    _, gradient, of_upstream, second = value_and_gradients(oodkern.sample_norm, [x], order=2)
    for scale in (2.0**-60, 2.0**60):
        _, a, b, c = value_and_gradients(oodkern.sample_norm, [x * scale], order=2)
        for ours, expected in ((a, gradient), (b, of_upstream), (c, second / scale)):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_infinities():
    x = torch.tensor([[torch.inf, 1.0], [-torch.inf, torch.inf], [torch.inf, torch.nan], [1.0, 0.0]])
    for dtype in FLOATS:
        norm = oodkern.sample_norm(x.to(dtype))
        assert norm[:2].isinf().all()
        assert norm[2].isnan()
        assert norm[3] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_number_of_threads_does_not_matter(dtype):
    """Bit for bit: pieces and their order are fixed. With 2 threads the 10 rows are gone through whole, with 7 not."""
    before = torch.get_num_threads()
    for shape in ((3, 5 * PIECE + 77), (10, 3 * PIECE + 5), (40, 3 * PIECE), (300, 700)):
        x = like(torch.empty(shape, dtype=dtype))
        results = []
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                results.append(value_and_gradients(oodkern.sample_norm, [x], order=2))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("arguments", [forward, backward, double_backward])
def test_a_long_row_is_shared_out(arguments):
    name = dict(zip((forward, backward, double_backward), (name for name, _ in RAW), strict=True))[arguments]
    tensors = arguments(torch.randn(1, 2**24))
    assert_shares_its_work(lambda: getattr(torch.ops.oodkern, name)(*tensors))


def test_long_rows_are_exact():
    """A row as long as an image, summed to the rounding of its result."""
    x = like(torch.empty(2, 3, 224, 224))
    for a, b in by_sample(x, order=2):
        assert_two_sided(a, b, b, rows=a.dim() > 1, condition=8.0)


def test_raw_ops_guard_their_memory():
    ops = torch.ops.oodkern
    x = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="grad: expected one number per row of x"):
        ops.sample_norm_backward(torch.ones(3), x, torch.ones(4))
    with pytest.raises(RuntimeError, match="norm: expected one number per row of x"):
        ops.sample_norm_backward(torch.ones(4), x, torch.ones(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="cotangent: expected the shape and dtype of x"):
        ops.sample_norm_double_backward(torch.ones(4, 4), torch.ones(4), x, torch.ones(4))
    with pytest.raises(RuntimeError, match="x: expected float64"):
        ops.sample_norm(torch.ones(2, 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"x: expected \[..., K\], got a tensor without dimensions"):
        ops.sample_norm(torch.tensor(1.0))


def test_names_of_errors():
    with pytest.raises(ValueError, match=r"x: expected \[N, ...\], got a tensor without dimensions"):
        oodkern.sample_norm(torch.tensor(1.0))


def test_compiles_with_images_of_any_layout():
    torch._dynamo.reset()
    compiled = torch.compile(oodkern.sample_norm, fullgraph=True)
    for x in (torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5).contiguous(memory_format=CHANNELS_LAST)):
        for a, b in zip(value_and_gradients(compiled, [x]), value_and_gradients(oodkern.sample_norm, [x]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_vmap_over_channels_last():
    x = torch.randn(2, 3, 4, 5, 6).transpose(2, 4)
    expected = torch.stack([oodkern.sample_norm(one) for one in x])
    torch.testing.assert_close(torch.func.vmap(oodkern.sample_norm)(x), expected)


def test_backends_agree():
    x = torch.randn(4, 2, 3, 5)
    with oodkern.backend("native"):
        native = oodkern.sample_norm(x)
    with oodkern.backend("reference"):
        assert torch.equal(oodkern.sample_norm(x), reference.sample_norm(x))
    torch.testing.assert_close(native, reference.sample_norm(x))
    meta = oodkern.sample_norm(x.bfloat16().to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == ((4,), torch.float32, "meta")
