"""The exact penalty on input gradients of networks as they are: normalised, checkpointed, attentive, mixed, large."""

import functools

import pytest
import torch
from networks import IMAGE, batch, error, penalised, plain, scorer
from oracle import memory_events
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oodkern
from oodkern import gradient_penalty, input_gradient_norm


def ways_to_score(module):
    """The same scores by a module, a method, a closure, arguments, and the object of another class."""
    holder = type("Trainer", (), {"__init__": lambda self: setattr(self, "net", module)})()
    holder.score = lambda x: holder.net(x)
    return {
        "module": module,
        "method": module.forward,
        "closure": lambda x: oodkern.energy(module.head(module.body(x))),
        "partial": functools.partial(lambda net, x: net(x), module),
        "default": lambda x, net=module: net(x),
        "attribute": holder.score,
        "functional": lambda x: torch.func.functional_call(module, dict(module.named_parameters()), (x,)),
        "dictionary": lambda x, nets={"one": module}: nets["one"](x),
    }


@pytest.mark.parametrize(
    "way", ["module", "method", "closure", "partial", "default", "attribute", "functional", "dictionary"]
)
def test_batch_normalisation_is_on_running_statistics(way):
    module, (x, weight) = scorer().train(), batch()
    before = {name: value.clone() for name, value in module.named_buffers()}
    assert any("num_batches_tracked" in name for name in before)
    score_fn = ways_to_score(module)[way]
    value, gradients = penalised(module, lambda: gradient_penalty(score_fn, x, weight, chunk=4))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(one.training for one in module.modules())
    exact_value, exact = plain(module, x, weight)
    assert error(value, exact_value) < 1e-6
    assert error(gradients, exact) < 1e-5
    module(x)
    assert not torch.equal(module.body[1].running_mean, before["body.1.running_mean"])  # as ever, afterwards


class TestBatchNormalisation:
    def test_is_restored_after_an_error(self):
        module, (x, weight) = scorer().train(), batch()

        def fails(t):
            module(t)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            gradient_penalty(fails, x, weight)
        assert all(one.training for one in module.modules())
        assert not nn.modules.module._global_forward_pre_hooks

    def test_in_evaluation_stays_there(self):
        module, (x, weight) = scorer().train(), batch()
        module.body[1].eval()
        gradient_penalty(module, x, weight)
        assert (module.body[1].training, module.body[4].training) == (False, True)

    def test_functional_on_batch_statistics_is_refused(self):
        mean, var = torch.zeros(3), torch.ones(3)
        x, weight = batch()

        def score(t, training):
            return F.batch_norm(t, mean, var, training=training).flatten(1).sum(1)

        with pytest.raises(RuntimeError, match="score_fn: expected batch normalisation in modules"):
            gradient_penalty(lambda t: score(t, True), x, weight)
        gradient_penalty(lambda t: score(t, False), x, weight)


@pytest.mark.parametrize("use", ["function", "layer"])
def test_attention_is_differentiated_twice(use):
    """On the CPU only the math backend can be; it is taken inside, and only there."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 24)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    module = nn.ModuleList([linear, layer])
    x = torch.randn(5, 7, 8)

    def score(t):
        if use == "layer":
            return oodkern.energy(layer(t).mean(1))
        q, k, v = linear(t).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return oodkern.energy(F.scaled_dot_product_attention(q, k, v).flatten(1))

    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        input_gradient_norm(score(leaf), leaf, create_graph=True).sum().backward()
    _, ours = penalised(module, lambda: gradient_penalty(score, x, torch.ones(5), chunk=2))
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        _, exact = penalised(module, lambda: input_gradient_norm(score(leaf), leaf, create_graph=True).sum())
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("second_order", ["exact", "finite_difference"])
def test_checkpointing(second_order):
    """Layers that are computed again inside the gradients: same gradients, statistics as they were."""
    module, (x, weight) = scorer().train(), batch()
    before = {name: value.clone() for name, value in module.named_buffers()}

    def score(t):
        return oodkern.energy(module.head(checkpoint(module.body, t, use_reentrant=False)))

    _, ours = penalised(module, lambda: gradient_penalty(score, x, weight, second_order, chunk=4))
    _, expected = penalised(module, lambda: gradient_penalty(module, x, weight, second_order, chunk=4))
    torch.testing.assert_close(ours, expected)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_in_a_compiled_step():
    """torch.compile breaks its graph at the penalty, whose functions it could not differentiate twice."""
    torch._dynamo.reset()
    module, (x, weight) = scorer().eval(), batch()

    def step(x, weight):
        return module(x).square().mean() + gradient_penalty(module, x, weight, chunk=4) * 0.5

    expected = penalised(module, lambda: step(x, weight))
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(penalised(module, lambda: compiled(x, weight)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    """float16 keeps gradients that it would round to zero, whether autocast is around the penalty or in the score."""
    module, (x, weight) = scorer(norm=False), batch()
    with torch.no_grad():
        module.head.weight.mul_(1e-3)  # gradients of 1e-6 in the input
    autocast = functools.partial(torch.autocast, "cpu", dtype)

    def score(t):
        with autocast(enabled=inside or torch.is_autocast_enabled("cpu")):
            return module(t)

    def penalty():
        with autocast(enabled=not inside):
            return gradient_penalty(score, x, weight, chunk=4)

    value, gradients = penalised(module, penalty)
    exact_value, exact = plain(module, x, weight)
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert error(value, exact_value) < tolerance
    assert error(gradients, exact) < tolerance
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in module.parameters())


def test_memory_does_not_grow_with_the_rows():
    """The most that is held at once, by the allocator's account: one chunk's."""
    module = scorer(norm=False)

    def peak(rows, chunk):
        x, weight = torch.randn(rows, *IMAGE), torch.ones(rows)
        gradient_penalty(module, x[:1], weight[:1])  # the first call sets up what is allocated once
        held = most = 0
        for change in memory_events(lambda: gradient_penalty(module, x, weight, chunk=chunk)):
            held += change
            most = max(most, held)
        return most

    one, four, sixteen = peak(16, 16), peak(64, 16), peak(256, 16)
    assert four < 1.1 * one
    assert sixteen < 1.1 * one
    assert peak(64, 64) > 2.5 * one  # and chunks are what does it
