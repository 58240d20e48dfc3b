"""Room `heads`, gradients that are formed with their values: what comes back is compared with what was foreseen."""

import pytest
import torch
from oracle import allocations, largest, like
from room_heads import FLOATS, HEADS, gradient_of, random

from oodkern.ops import heads


@pytest.fixture(params=HEADS)
def function(request):
    return HEADS[request.param]


class Passes:
    """How often gradients are formed anew within."""

    def __enter__(self):
        self.count, self.before = 0, heads.raw

        def counted(backend, name, *arguments):
            self.count += name == "head_backward"
            return self.before(backend, name, *arguments)

        heads.raw = counted
        return self

    def __exit__(self, *_):
        heads.raw = self.before


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_foreseen_is_handed_out(function, dtype):
    """Of a sum nothing need be said in float32; the mean's 1 / N, or any [N], may be."""
    z = random((24, 50), dtype)
    score = torch.promote_types(dtype, torch.float32)
    sixteen = dtype in FLOATS[2:]
    uneven = like(torch.empty(24, dtype=score))
    nearly = torch.ones(24, dtype=score)
    nearly[7] = 1.01
    for grad, told, anew in (
        (torch.ones(24, dtype=score), None, sixteen),
        (torch.full((24,), 1 / 24, dtype=score), 1 / 24, False),
        (uneven, uneven, False),
        (uneven, None, sixteen),
        (uneven, 1.0, sixteen),
        (uneven * (1 + 16 * torch.finfo(torch.float32).eps), uneven, sixteen),  # more than a rounding
        (uneven, 0.25, True),
        (uneven * 0.3, uneven, sixteen),
        (uneven * 4, uneven, dtype == torch.float16),
        (nearly * uneven, uneven, True),
        (nearly, None, sixteen),
    ):
        with Passes() as passes:
            ours = gradient_of(function, z, grad, upstream=told)
        assert passes.count == anew, (grad[:2], told)
        with Passes() as passes:
            leaf = z.detach().requires_grad_()
            value = function(leaf)
            value.backward(grad, create_graph=True)  # always formed anew
        assert passes.count == 1
        error = (ours.double() - leaf.grad.double()).abs()
        # A unit in the last place of 16 bits, where roundings of the factor decide between two numbers.
        unit = torch.finfo(dtype).eps if sixteen else 4 * torch.finfo(dtype).eps
        size = leaf.grad.double().abs() if sixteen else largest(leaf.grad.double())
        assert (error <= unit * size + torch.finfo(dtype).tiny).all()


def test_mean_and_weighted_mean(function):
    z = random((37, 50))
    for weight in (1.0, 0.1):
        leaf = z.clone().requires_grad_()
        with Passes() as passes:
            (weight * function(leaf, upstream=weight / 37).mean()).backward()
        assert passes.count == 0
        exact = gradient_of(function, z.double(), torch.full((37,), weight / 37).double())
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-7)


def test_a_second_backward_pass(function):
    """The first one multiplied what was formed, in place: the second forms it anew."""
    leaf, grad = random((9, 20)).requires_grad_(), like(torch.empty(9))
    value = function(leaf)
    first = torch.autograd.grad(value, leaf, grad, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(value, leaf, grad)[0]
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
    assert torch.equal(first, kept)


def test_where_an_upstream_cannot_be_looked_at(function):
    """Batches of upstreams and tensors that are saved elsewhere: the gradient is formed in the backward pass."""
    leaf, grad = random((9, 20)).requires_grad_(), like(torch.empty(9))
    one = gradient_of(function, leaf, grad)
    both = torch.autograd.grad(function(leaf), leaf, torch.stack([grad, 2 * grad]), is_grads_batched=True)[0]
    torch.testing.assert_close(both, torch.stack([one, 2 * one]), rtol=1e-5, atol=1e-6)
    with torch.autograd.graph.save_on_cpu(), Passes() as passes:
        torch.testing.assert_close(gradient_of(function, leaf, grad), one, rtol=1e-5, atol=1e-6)
    assert passes.count == 1


class TestWithoutLooking:
    """As on a GPU: a gradient is formed with its value where an upstream is told, and rows of another are mended."""

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(heads, "would_wait", lambda tensor: True)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_rows_of_another_upstream_are_formed_anew(self, function, dtype):
        z, told = random((24, 50), dtype), like(torch.empty(24, dtype=torch.promote_types(dtype, torch.float32)))
        for changed in ([], [3], [5, 6, 23], list(range(24))):
            grad = told.clone()
            grad[changed] *= 1.5
            with Passes() as passes:
                ours = gradient_of(function, z, grad, upstream=told)
            assert passes.count == 0
            assert torch.equal(ours, gradient_of(function, z, grad))

    def test_other_rows_are_left_alone(self, function):
        z, told = random((9, 50)), like(torch.empty(9))
        formed = []

        def kept(backend, name, *arguments):
            if name == "head_mend":
                formed.append(arguments[1].fill_(7))
            return before(backend, name, *arguments)

        before, heads.raw = heads.raw, kept
        try:
            assert (gradient_of(function, z, told * (1 + 1e-7), upstream=told) == 7).all()
            other = told.clone()
            other[4] = torch.nan
            gradient = gradient_of(function, z, other, upstream=told)
        finally:
            heads.raw = before
        assert gradient[4].isnan().all()
        assert (gradient[[0, 1, 2, 3, 5, 6, 7, 8]] == 7).all()
        assert len(formed) == 2

    def test_nothing_is_formed_unless_told(self, function):
        leaf = random((64, 1000)).requires_grad_()
        function(leaf)
        assert sum(allocations(lambda: function(leaf))) < leaf.nbytes // 8


def test_an_upstream_that_changes_is_noticed(function):
    leaf, told = random((9, 20)).requires_grad_(), torch.ones(9)
    value = function(leaf, upstream=told)
    told.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward(told)


def test_no_gradient_without_need(function):
    """Neither without gradients, nor of logits that require none, is one allocated."""
    z = random((64, 1000))
    function(z)
    assert sum(allocations(lambda: function(z))) < z.nbytes // 8
    leaf = z.clone().requires_grad_()
    with torch.no_grad():
        assert sum(allocations(lambda: function(leaf))) < z.nbytes // 8
    function(leaf)
    formed = allocations(lambda: function(leaf))
    assert z.nbytes <= sum(formed) < z.nbytes + z.nbytes // 8
    value, grad = function(leaf), like(z[:, 0])
    backward = allocations(lambda: torch.autograd.grad(value, leaf, grad))
    assert sum(backward) < z.nbytes // 8  # in place


def test_rejects(function):
    z = random((4, 5)).requires_grad_()
    with pytest.raises(ValueError, match=r"upstream: expected \[4\] of float32, .* got \[5\] of float32"):
        function(z, upstream=torch.ones(5))
    with pytest.raises(ValueError, match=r"upstream: expected \[4\] of float32, .* got \[4\] of float64"):
        function(z, upstream=torch.ones(4, dtype=torch.float64))
    for wrong in ("1", True):
        with pytest.raises(TypeError, match="upstream: expected a number or a tensor, got"):
            function(z, upstream=wrong)
