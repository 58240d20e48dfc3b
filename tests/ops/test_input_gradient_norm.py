"""Norms of the gradients of scores in their inputs."""

import pytest
import torch
from networks import batch, error, penalised, plain, scorer

import oodkern
from oodkern import input_gradient_norm


class TestInputGradientNorm:
    def test_against_a_sample_at_a_time(self):
        module, (x, _) = scorer().eval(), batch()
        leaf = x.clone().requires_grad_()
        norm = input_gradient_norm(module(leaf), leaf)
        assert (norm.dtype, norm.shape, norm.requires_grad) == (torch.float32, (11,), False)
        exact = torch.stack([plain(module, one[None], torch.ones(1))[0] for one in x])
        assert error(norm, exact) < 1e-6

    def test_create_graph(self):
        module, (x, weight) = scorer().eval(), batch()
        leaf = x.clone().requires_grad_()

        def penalty():
            return (weight * input_gradient_norm(module(leaf), leaf, create_graph=True)).sum()

        value, gradients = penalised(module, penalty)
        exact_value, exact = plain(module, x, weight)
        assert error(value, exact_value) < 1e-6
        assert error(gradients, exact) < 1e-5

    def test_gradgradcheck_in_float64(self):
        weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

        def norms(x, weight):
            return input_gradient_norm(oodkern.energy(x.tanh() @ weight.T), x, create_graph=True)

        assert norms(x, weight).dtype == torch.float64
        assert torch.autograd.gradcheck(norms, (x, weight))

    def test_the_graph_is_kept(self):
        module, (x, _) = scorer().eval(), batch()
        leaf = x.clone().requires_grad_()
        score = module(leaf)
        first = input_gradient_norm(score, leaf)
        assert torch.equal(input_gradient_norm(score, leaf), first)
        score.sum().backward()

    def test_small_gradients_of_float16(self):
        """An upstream of 1 gives gradients of 2e-8 here, which float16 rounds to zero."""
        leaf = torch.randn(3, 400, dtype=torch.float16, requires_grad=True)
        norm = input_gradient_norm((leaf * 2e-8).sum(1), leaf)
        torch.testing.assert_close(norm, torch.full((3,), 2e-8 * 20), rtol=0.01, atol=0)

    def test_coupled_rows(self):
        """Where batch normalisation couples rows, a row's gradient is that of the sum of all scores."""
        module, (x, _) = scorer().train(), batch()
        leaf = x.clone().requires_grad_()
        score = module(leaf)
        (gradient,) = torch.autograd.grad(score.sum(), leaf, retain_graph=True)
        torch.testing.assert_close(input_gradient_norm(score, leaf), gradient.flatten(1).norm(dim=1))

    def test_errors(self):
        x = torch.randn(3, 4, requires_grad=True)
        with pytest.raises(ValueError, match=r"score: expected scores \[3\], one a row of inputs, got \[3, 1\]"):
            input_gradient_norm(x.sum(1, keepdim=True), x)
        with pytest.raises(ValueError, match="inputs: expected a tensor that required a gradient"):
            input_gradient_norm(x.sum(1), x.detach())
        with pytest.raises(ValueError, match="score: expected a score with a graph"):
            input_gradient_norm(x.detach().sum(1), x)
        with pytest.raises(ValueError, match="score: expected a score that depends on the inputs"):
            input_gradient_norm(torch.randn(3, 4, requires_grad=True).sum(1), x)
        with pytest.raises(TypeError, match="score: expected one of float64"):
            input_gradient_norm(torch.ones(3, dtype=torch.int64), x)
        with pytest.raises(ValueError, match=r"inputs: expected \[N, ...\]"):
            input_gradient_norm(x.sum(1), torch.tensor(1.0))
