"""GReg's penalty beside the formula, the released code's form of it, and what it is made of."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from networks import IMAGE, flat_gradients, penalised, scorer
from oracle import like
from test_from_features import batch as fused_batch

import oodkern
from oodkern.losses import GRegLoss


def detecting(rows, outliers, **options):
    """A smooth network with batch normalisation, inputs, and a loss that detects some rows of either side."""
    module = scorer().double().eval()
    x = torch.randn(rows + outliers, *IMAGE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    is_ood = torch.arange(rows + outliers) >= rows
    with torch.no_grad():
        score = module(x)
    low, high = score.quantile(torch.tensor([0.45, 0.55]).double()).tolist()
    loss = GRegLoss(margin_in=low, margin_out=high, **options)
    assert 0 < (score[:rows] <= low).sum() < rows
    assert 0 < (score[rows:] >= high).sum() < outliers
    return module, x, is_ood, score, loss


@pytest.mark.parametrize("rows", [(8, 8), (5, 6), (12, 20)])
def test_code_is_paper_divided_by_the_number_of_rows(rows):
    """With frozen batch normalisation, the whole penalty and its gradients: exactly, where rows are a power of two."""
    module, x, is_ood, score, loss = detecting(*rows)
    results = []
    for scale in ("code", "paper"):
        loss.gradient_scale = scale
        weight = loss.penalty_weight(score, is_ood)
        results.append(penalised(module, lambda weight=weight: oodkern.gradient_penalty(module, x, weight)))
    for code, paper in zip(*results, strict=True):
        exact = math.log2(sum(rows)).is_integer()
        torch.testing.assert_close(code * sum(rows), paper, rtol=0 if exact else 1e-14, atol=0 if exact else 1e-16)
    assert results[0][0] > 0
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [(8, 8), (5, 6)])
def test_the_released_code(rows, training):
    """g = -mean_i relu(m_in - S_i) + mean_j relu(S_j - m_out), and the mean over all rows of the norms of dg/dX.

    With batch normalisation in evaluation mode, which is what the penalty takes of a network in training too.
    """
    module, x, is_ood, score, loss = detecting(*rows)
    n = rows[0]
    literal = copy.deepcopy(module)

    def released():
        X = x.clone().requires_grad_()
        S = literal(X)
        g = -(loss.margin_in - S[:n]).relu().mean() + (S[n:] - loss.margin_out).relu().mean()
        (G,) = torch.autograd.grad(g, X, create_graph=True)
        return G.flatten(1).norm(dim=1).mean()

    expected = penalised(literal, released)
    weight = loss.penalty_weight(score, is_ood)
    ours = penalised(module.train(training), lambda: oodkern.gradient_penalty(module, x, weight))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_the_whole_loss():
    """One backward pass through hinges and penalty, as the docstring has it."""
    module, x, is_ood, _, loss = detecting(5, 6, alpha=0.3, beta=2.0)
    target = torch.where(is_ood, -1, torch.arange(11) % 6)

    def ours(net):
        logits = net.head(net.body(x))
        penalty = oodkern.gradient_penalty(net, x, loss.penalty_weight(oodkern.energy(logits), is_ood))
        return loss(logits, target, penalty)

    def plain(net):
        X = x.clone().requires_grad_()
        z = net.head(net.body(X))
        E = -torch.logsumexp(z, -1)
        (G,) = torch.autograd.grad(E.sum(), X, create_graph=True)
        norms = G.flatten(1).norm(dim=1)
        i, o, m_in, m_out = norms[:5], norms[5:], loss.margin_in, loss.margin_out
        penalty = (i * (E[:5] <= m_in)).mean() + (o * (E[5:] >= m_out)).mean()
        hinges = ((E[:5] - m_in).relu() ** 2).mean() + ((m_out - E[5:]).relu() ** 2).mean()
        return F.cross_entropy(z[:5], target[:5]) + 0.3 * hinges + 2.0 * penalty / 11

    results = []
    for function in (ours, plain):
        net = copy.deepcopy(module)
        value = function(net)
        value.backward()
        results.append((value.detach(), flat_gradients(net)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_second_derivative_of_the_energy_of_a_head():
    """Of -LSE(W x + b): the gradient is -W^T p, and along v it changes by -W^T [p (t - p.t)], t = W v."""
    (x, w, b), _ = fused_batch(False)
    leaf, v = x.clone().requires_grad_(), like(x)
    (gradient,) = torch.autograd.grad(oodkern.linear_energy(leaf, w, b).sum(), leaf, create_graph=True)
    (found,) = torch.autograd.grad((gradient * v).sum(), leaf)
    p, t = F.linear(x, w, b).softmax(-1), v @ w.T
    torch.testing.assert_close(gradient.detach(), -p @ w, rtol=1e-11, atol=1e-13)
    expected = -(p * (t - (p * t).sum(-1, keepdim=True))) @ w
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_a_norm_is_that_of_the_derivative_along_it():
    """d ||G|| = d (u.G) for u = G / ||G|| held fixed, off by step^2 in central differences."""
    module, x, is_ood, score, loss = detecting(8, 8)
    weight = loss.penalty_weight(score, is_ood)
    exact = penalised(module, lambda: oodkern.gradient_penalty(module, x, weight))

    def along():
        X = x.clone().requires_grad_()
        (G,) = torch.autograd.grad(module(X).sum(), X, create_graph=True)
        u = F.normalize(G.detach().flatten(1), dim=1)
        return (weight * (u * G.flatten(1)).sum(1)).sum()

    for one, other in zip(penalised(module, along), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    errors = []
    for step in (2e-2, 1e-2, 5e-3):
        options = {"second_order": "finite_difference", "step": step}
        value, gradient = penalised(module, lambda o=options: oodkern.gradient_penalty(module, x, weight, **o))
        torch.testing.assert_close(value, exact[0], rtol=1e-12, atol=0)
        errors.append(((gradient - exact[1]).norm() / exact[1].norm()).item())
    assert errors[0] < 1e-2
    for larger, smaller in itertools.pairwise(errors):
        assert 3.7 < larger / smaller < 4.3
