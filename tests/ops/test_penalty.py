"""The exact penalty on input gradients: values, weights, parameters, errors."""

import pytest
import torch
from networks import batch, error, flat_gradients, penalised, plain, scorer
from torch import nn

from oodkern import gradient_penalty


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.ReLU()], ids=["SiLU", "GELU", "ReLU"])
@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 100])
def test_exact_against_a_sample_at_a_time(activation, chunk):
    module, (x, weight) = scorer(activation), batch()
    value, gradients = penalised(module, lambda: gradient_penalty(module, x, weight, chunk=chunk))
    exact_value, exact = plain(module, x, weight)
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert error(value, exact_value) < 1e-6
    # Twice what plain autograd loses in float32.
    assert error(gradients, exact) < 2 * error(plain(module, x, weight, torch.float32)[1], exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    module, (x, weight) = scorer().to(dtype), batch()
    value, gradients = penalised(module, lambda: gradient_penalty(module, x.to(dtype), weight.to(dtype), chunk=3))
    exact_value, exact = plain(module, x.to(dtype), weight.to(dtype))
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert error(value, exact_value) < tolerance
    assert error(gradients, exact) < tolerance
    assert all(p.grad is None or p.grad.dtype == dtype for p in module.parameters())


def test_upstream_and_other_losses():
    """The penalty is one term of a loss: its gradients are scaled with it and added to the others."""
    module, (x, weight) = scorer(), batch()
    _, alone = penalised(module, lambda: gradient_penalty(module, x, weight))
    _, other = penalised(module, lambda: module(x).square().mean())
    module = scorer()  # running statistics as they were
    loss = -0.7 * gradient_penalty(module, x, weight) + module(x).square().mean()
    loss.backward()
    torch.testing.assert_close(flat_gradients(module), other - 0.7 * alone)


def test_can_be_sent_backward_again_but_not_differentiated_again():
    module, (x, weight) = scorer(), batch()
    penalty = gradient_penalty(module, x, weight)
    some = [module.head.weight, module.body[0].weight]
    first = torch.autograd.grad(penalty, some, retain_graph=True)
    for a, b in zip(torch.autograd.grad(penalty, some, retain_graph=True), first, strict=True):
        assert torch.equal(a, b)
    upstream = torch.ones((), requires_grad=True)
    (one,) = torch.autograd.grad(penalty, some[:1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        one.sum().backward()


def test_repeats_bit_for_bit():
    module, (x, weight) = scorer(), batch()
    first = penalised(module, lambda: gradient_penalty(module, x, weight, chunk=4))
    for a, b in zip(penalised(module, lambda: gradient_penalty(module, x, weight, chunk=4)), first, strict=True):
        assert torch.equal(a, b)


class TestWeight:
    def test_bool(self):
        module, (x, _) = scorer(), batch()
        chosen = torch.arange(11) % 2 == 0
        results = [penalised(module, lambda w=w: gradient_penalty(module, x, w)) for w in (chosen, chosen.float())]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_only_rows_of_weight_are_forwarded(self):
        x, weight = batch(11)
        sizes = []

        def score(rows):
            sizes.append(rows[:, 0, 0, 0].tolist())
            return rows.square().flatten(1).sum(1)

        gradient_penalty(score, x, weight, chunk=3)
        assert [len(size) for size in sizes] == [3, 3, 1]
        assert [one for size in sizes for one in size] == x[weight != 0][:, 0, 0, 0].tolist()

    @pytest.mark.parametrize("rows", [0, 5])
    @pytest.mark.parametrize("second_order", ["exact", "finite_difference"])
    def test_zero_costs_nothing(self, rows, second_order):
        def never(x):
            raise AssertionError("called for a weight of zero")

        penalty = gradient_penalty(never, torch.randn(rows, 4), torch.zeros(rows), second_order)
        assert penalty.item() == 0
        assert penalty.requires_grad
        penalty.backward()

    def test_nan_is_not_left_out(self):
        module, (x, weight) = scorer(), batch()
        weight[4] = torch.nan
        assert gradient_penalty(module, x, weight).isnan()


class TestParameters:
    def test_frozen(self):
        module, (x, weight) = scorer(), batch()
        _, every = penalised(module, lambda: gradient_penalty(module, x, weight))
        module.head.requires_grad_(False)
        _, some = penalised(module, lambda: gradient_penalty(module, x, weight))
        head = sum(p.numel() for p in module.head.parameters())
        torch.testing.assert_close(some[:-head], every[:-head])
        assert module.head.weight.grad is None
        module.requires_grad_(False)
        penalty = gradient_penalty(module, x, weight)
        assert penalty > -10
        penalty.backward()

    def test_a_linear_score(self):
        """Its gradient does not depend on the input, and in the bias there is none."""
        head, (x, weight) = nn.Linear(192, 1), batch()
        value, _ = penalised(head, lambda: gradient_penalty(lambda t: head(t.flatten(1)).squeeze(1), x, weight))
        torch.testing.assert_close(value, weight.sum() * head.weight.norm())
        torch.testing.assert_close(head.weight.grad, weight.sum() * head.weight.detach() / head.weight.norm().detach())
        assert head.bias.grad is None

    def test_leaves_that_are_no_parameters(self):
        scale, (x, weight) = torch.tensor(2.0, requires_grad=True), batch()
        gradient_penalty(lambda t: scale * t.flatten(1).sum(1), x, weight).backward()
        torch.testing.assert_close(scale.grad, weight.sum() * 192**0.5)
        assert x.grad is None

    def test_a_parameter_that_some_chunks_use(self):
        """What is found differs from chunk to chunk, as with stochastic depth."""
        a, b = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0))
        x = torch.randn(6, 4)
        x[:3, 0] = -9.0

        def score(t):
            return (a if t[0, 0] < -5 else b) * t.sum(1)

        gradient_penalty(score, x, torch.ones(6), chunk=3).backward()
        torch.testing.assert_close((a.grad, b.grad), (torch.tensor(6.0), torch.tensor(6.0)))

    def test_inputs_get_no_gradient(self):
        module, (x, weight) = scorer(), batch()
        x.requires_grad_()
        gradient_penalty(module, x, weight).backward()
        assert x.grad is None

    def test_no_grad(self):
        module, (x, weight) = scorer(), batch()
        expected = gradient_penalty(module, x, weight)
        for second_order in ("exact", "finite_difference"):
            with torch.no_grad():
                value = gradient_penalty(module, x, weight, second_order)
            assert not value.requires_grad
            torch.testing.assert_close(value, expected.detach())


class TestErrors:
    x, weight = torch.randn(3, 4), torch.ones(3)

    @staticmethod
    def score(t):
        return t.sum(1)

    def test_arguments(self):
        x, weight, score = self.x, self.weight, self.score
        with pytest.raises(TypeError, match="score_fn: expected a function from inputs to scores, got Tensor"):
            gradient_penalty(x, x, weight)
        with pytest.raises(TypeError, match="inputs: expected one of float64"):
            gradient_penalty(score, x.long(), weight)
        with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor, got float"):
            gradient_penalty(score, x, 1.0)
        with pytest.raises(TypeError, match=r"weight: expected one of .*, got int64"):
            gradient_penalty(score, x, weight.long())
        with pytest.raises(ValueError, match=r"weight: expected \[3\], one number a row of inputs, got \[3, 1\]"):
            gradient_penalty(score, x, weight[:, None])
        with pytest.raises(ValueError, match="weight: expected a tensor without a gradient"):
            gradient_penalty(score, x, weight.clone().requires_grad_())
        with pytest.raises(ValueError, match="weight: expected on cpu, where inputs are, got meta"):
            gradient_penalty(score, x, weight.to("meta"))
        with pytest.raises(ValueError, match="second_order: expected 'exact' or 'finite_difference', got 'both'"):
            gradient_penalty(score, x, weight, "both")
        with pytest.raises(ValueError, match="step: expected a positive number, got 0"):
            gradient_penalty(score, x, weight, step=0)
        with pytest.raises(TypeError, match="step: expected a number, got Tensor"):
            gradient_penalty(score, x, weight, step=torch.tensor(1.0))
        with pytest.raises(ValueError, match="chunk: expected a number of rows, at least 1, got 0"):
            gradient_penalty(score, x, weight, chunk=0)
        with pytest.raises(TypeError, match="chunk: expected a number of rows or None, got float"):
            gradient_penalty(score, x, weight, chunk=1.5)

    def test_scores(self):
        x, weight = self.x, self.weight
        for wrong, shape in ((lambda t: t, r"\[3, 4\]"), (lambda t: t.sum(), r"\[\]")):
            with pytest.raises(ValueError, match=rf"score_fn: expected scores \[3\], one a row of inputs, got {shape}"):
                gradient_penalty(wrong, x, weight)
        with pytest.raises(ValueError, match="score_fn: expected a score with a graph, got one without"):
            gradient_penalty(lambda t: t.detach().sum(1), x, weight)
        parameter = torch.ones(3, requires_grad=True)
        with pytest.raises(ValueError, match="score_fn: expected a score that depends on the inputs"):
            gradient_penalty(lambda t: parameter * 2, x, weight)
        with pytest.raises(TypeError, match=r"score_fn: expected a torch\.Tensor, got list"):
            gradient_penalty(lambda t: [1.0], x, weight)
