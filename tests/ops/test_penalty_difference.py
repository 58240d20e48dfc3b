"""The penalty on input gradients by finite differences."""

import functools
import warnings

import pytest
import torch
from networks import batch, error, penalised, plain, scorer
from oracle import memory_events
from torch import nn
from torch.nn import functional as F

import oodkern
from oodkern import gradient_penalty
from oodkern.ops._score_graph import KINKS, kinks_of, nodes_of

DIFFERENCE = "finite_difference"


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(), nn.Mish(), nn.Tanh()])
@pytest.mark.parametrize("chunk", [None, 3])
def test_agrees_with_exact_on_smooth_networks(activation, chunk):
    module, (x, weight) = scorer(activation), batch()
    exact_value, exact = penalised(module, lambda: gradient_penalty(module, x, weight))
    value, gradients = penalised(module, lambda: gradient_penalty(module, x, weight, DIFFERENCE, chunk=chunk))
    torch.testing.assert_close(value, exact_value)
    assert error(gradients, exact.double()) < 1e-3


def test_converges_with_the_square_of_the_step():
    """In float64; the difference is central."""
    module, (x, weight) = scorer().double(), batch()
    x, weight = x.double(), weight.double()
    _, exact = plain(module, x, weight)
    errors = [
        error(penalised(module, lambda s=step: gradient_penalty(module, x, weight, DIFFERENCE, s))[1], exact)
        for step in (4e-2, 1e-2, 2.5e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.1)


def test_the_step_is_relative_to_each_input():
    """Inputs a thousand times as large, of a network that divides them again, step a thousand times as far."""
    module, (x, weight) = scorer().double(), batch()
    scale = torch.logspace(-3, 3, 11, dtype=torch.float64).view(-1, 1, 1, 1)
    x, weight = x.double(), weight.double()
    expected = penalised(module, lambda: gradient_penalty(module, x, weight, DIFFERENCE, chunk=1))

    def rescaled():
        return sum(
            s * gradient_penalty(lambda t, s=s: module(t / s), x[i : i + 1] * s, weight[i : i + 1], DIFFERENCE)
            for i, s in enumerate(scale.flatten().tolist())
        )

    for a, b in zip(penalised(module, rescaled), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_rows_of_zeros_and_rows_without_a_gradient():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    x[0] = 0
    keep = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)  # the last row's gradient is zero

    def score(t):
        return keep * ((t @ w).tanh() + t.square().sum(1))

    grads = []
    for second_order in ("exact", DIFFERENCE):
        penalty = gradient_penalty(score, x, torch.ones(3), second_order, step=1e-4)
        assert penalty.isfinite()
        (grad,) = torch.autograd.grad(penalty, w)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_random_numbers_are_the_same_at_all_points():
    """Dropout that changed from one side to the other would be divided by the step."""
    module, (x, weight) = scorer(norm=False).double(), batch()
    x, weight = x.double(), weight.double()

    def score(t):
        return oodkern.energy(module.head(F.dropout(module.body(t), 0.4)))

    results = []
    for second_order in ("exact", DIFFERENCE):
        torch.manual_seed(5)
        results.append(penalised(module, lambda s=second_order: gradient_penalty(score, x, weight, s, 1e-3, chunk=4)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_memory_is_that_of_a_plain_step():
    """One graph at a time: no more than a forward and backward pass of the scores, but for the parameters' sums."""
    module = scorer(norm=False)
    x, weight = torch.randn(64, 3, 8, 8), torch.ones(64)

    def peak(work):
        work()
        held = most = 0
        for change in memory_events(work):
            held += change
            most = max(most, held)
        return most

    def plain_step():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(module(leaf).sum(), [leaf, *module.parameters()])

    step, difference, exact = (
        peak(plain_step),
        peak(lambda: gradient_penalty(module, x, weight, DIFFERENCE, chunk=64)),
        peak(lambda: gradient_penalty(module, x, weight, chunk=64)),
    )
    parameters = sum(p.numel() * 4 for p in module.parameters())
    assert difference < 1.15 * step + 3 * x.nbytes + 2 * parameters
    assert difference < 0.8 * exact


@pytest.mark.parametrize(
    "kinked",
    [
        F.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.selu, F.rrelu, F.softshrink,
        F.hardshrink, lambda t: F.threshold(t, 0.0, 0.0), lambda t: F.prelu(t, torch.tensor(0.2)),
        F.elu, F.celu,
        lambda t: F.huber_loss(t, t * 2, reduction="none"),
        lambda t: t.relu_(), lambda t: t.clamp(min=0), lambda t: t.clip(-1, 1), torch.abs,
        lambda t: F.max_pool2d(t, 2), lambda t: F.max_pool1d(t.flatten(1, 2), 2),
        lambda t: F.max_pool3d(t[:, None], (1, 2, 2)), lambda t: F.adaptive_max_pool2d(t, 2),
        lambda t: t.amax(1), lambda t: t.max(1)[0], lambda t: torch.maximum(t, -t), lambda t: torch.minimum(t, -t),
        lambda t: torch.fmax(t, -t), lambda t: t.sort(1)[0], lambda t: t.topk(2, 1)[0], lambda t: t.median(1)[0],
    ],
)  # fmt: skip
def test_kinks_are_refused(kinked):
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"expects a smooth score, and the graph of this one has \w+Backward\d, who"):
        gradient_penalty(lambda t: kinked(t * 1.5).flatten(1).sum(1), x, torch.ones(2), DIFFERENCE)


@pytest.mark.parametrize(
    "smooth",
    [
        F.silu, F.gelu, F.mish, F.softplus, torch.tanh, torch.sigmoid, F.logsigmoid,
        lambda t: F.avg_pool2d(t, 2), lambda t: F.glu(t, -1), lambda t: F.layer_norm(t, (8,)),
        lambda t: oodkern.energy(t), lambda t: oodkern.reference.energy(t), lambda t: oodkern.joint_energy(t),
        lambda t: F.scaled_dot_product_attention(t, t, t), lambda t: t.logsumexp(-1), lambda t: t.softmax(-1),
    ],
)  # fmt: skip
def test_smooth_functions_are_not_refused(smooth):
    x = torch.randn(2, 3, 8, 8)
    gradient_penalty(lambda t: smooth(t * 1.5).flatten(1).sum(1), x, torch.ones(2), DIFFERENCE)


def test_a_relu_network_is_refused_unless_told():
    module, (x, weight) = scorer(nn.ReLU()), batch()
    with pytest.raises(RuntimeError, match=r"ReluBackward0.*allow_kinks=True"):
        gradient_penalty(module, x, weight, DIFFERENCE)
    value, gradients = penalised(module, lambda: gradient_penalty(module, x, weight, DIFFERENCE, allow_kinks=True))
    exact_value, exact = penalised(module, lambda: gradient_penalty(module, x, weight))
    torch.testing.assert_close(value, exact_value)
    assert error(gradients, exact.double()) > 0.1  # which is why


def test_names_of_kinks_are_those_of_nodes():
    """A node that PyTorch renamed would pass unseen: these three stand for the table."""
    t = torch.randn(2, 3, 8, 8, requires_grad=True)
    score = F.max_pool2d(t.relu(), 2).amax(1)
    assert kinks_of(nodes_of(score)) == ["AmaxBackward0", "MaxPool2DWithIndicesBackward0", "ReluBackward0"]
    assert len(set(KINKS)) == len(KINKS)


@pytest.mark.parametrize("compiled", ["module", "function", "wrapped", "inside", "part", "in place"])
def test_compiled_modules_work_with_a_warning(compiled):
    """Gradients and statistics as without; torch.compile traces no hook of ours."""
    torch._dynamo.reset()
    module, (x, weight) = scorer().train(), batch()
    before = {name: value.clone() for name, value in module.named_buffers()}
    expected = penalised(module, lambda: gradient_penalty(module, x, weight, DIFFERENCE, chunk=4))
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    function = compile_(lambda t: module(t))
    inner = compile_(module.body if compiled == "inside" else module)
    score_fn = {
        "module": inner,
        "function": function,
        "wrapped": lambda t: function(t),
        "inside": lambda t: oodkern.energy(module.head(inner(t))),
    }.get(compiled, module)
    if compiled == "part":
        module.body[3] = compile_(module.body[3])
    if compiled == "in place":
        module.compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="cannot see into CompiledFunctionBackward"):
        ours = penalised(module, lambda: gradient_penalty(score_fn, x, weight, DIFFERENCE, chunk=4))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(one.training for one in module.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_penalty(score_fn, x, weight, DIFFERENCE, chunk=4, allow_kinks=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scores_are_float32(dtype):
    """oodkern's are; what a network itself leaves in 16 bits is refused."""
    module, (x, weight) = scorer(norm=False), batch()
    with torch.autocast("cpu", dtype):
        value, gradients = penalised(module, lambda: gradient_penalty(module, x, weight, DIFFERENCE, step=0.1))
        with pytest.raises(TypeError, match=f"score_fn: expected float32 scores, .* got {str(dtype)[6:]}"):
            gradient_penalty(lambda t: module.head(module.body(t))[:, 0], x, weight, DIFFERENCE)
    exact_value, exact = plain(module, x, weight)
    assert error(value, exact_value) < 0.05
    assert error(gradients, exact) < 0.3  # what 8 or 11 bits leave of a difference
    with pytest.raises(TypeError, match="inputs: expected float32, by which finite differences step, got"):
        gradient_penalty(module, x.to(dtype), weight, DIFFERENCE)


def test_batch_normalisation_and_its_statistics():
    module, (x, weight) = scorer().train(), batch()
    before = {name: value.clone() for name, value in module.named_buffers()}
    gradient_penalty(module, x, weight, DIFFERENCE).backward()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
