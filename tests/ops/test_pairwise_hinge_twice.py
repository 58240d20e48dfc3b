"""The pairwise hinge differentiated twice: its slopes are constants, and what is around it is not."""

import pytest
import torch
from layouts import FLOATS
from oracle import like
from pairs import all_pairs, scores

import oodkern


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in scores(9, 12, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda a, b: oodkern.pairwise_hinge(a, b, 0.3), leaves, check_batched_grad=True, eps=1e-7
    )
    assert torch.autograd.gradgradcheck(lambda a, b: oodkern.pairwise_hinge(a, b, 0.3).sin(), leaves)


def second(function, pair):
    """Of what comes before and after the loss: the upstream's and the scores' derivatives of their gradients."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in pair]
    scores = [leaf.sin().to(tensor.dtype) for leaf, tensor in zip(leaves, pair, strict=True)]
    upstream = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    gradients = torch.autograd.grad(function(*scores).double().square(), leaves, upstream, create_graph=True)
    return torch.autograd.grad(gradients, [upstream, *leaves], [like(gradient) for gradient in gradients])


@pytest.mark.parametrize("dtype", FLOATS)
def test_second_derivatives(dtype):
    """Against all pairs: the slopes are constants, and what is around them is not."""
    pair = scores(9, 12, dtype)
    eps = torch.finfo(dtype).eps if torch.finfo(dtype).bits == 16 else 1e-6
    ours = second(lambda a, b: oodkern.pairwise_hinge(a, b, 0.3), pair)
    oracle = second(lambda a, b: all_pairs(a.double(), b.double(), 0.3), pair)
    for x, exact in zip(ours, oracle, strict=True):
        assert exact.abs().max() > 0.01
        assert (x - exact).abs().max() <= 4 * eps * exact.abs().max()


def test_curvature_in_the_scores_is_zero_and_not_an_error():
    """As torch.relu has it: of the loss alone, whose upstream is constant."""
    for chosen in ((0,), (1,), (0, 1)):
        leaves = scores(5, 6, torch.float64)
        wanted = [leaves[i].requires_grad_() for i in chosen]
        gradients = torch.autograd.grad(oodkern.pairwise_hinge(*leaves, 0.3), wanted, create_graph=True)
        assert all(gradient.requires_grad and gradient.abs().sum() > 0 for gradient in gradients)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), wanted)
        assert [tensor.abs().sum().item() for tensor in second] == [0.0] * len(chosen)
    id_score, ood_score = scores(4, 5, torch.float64)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda a: oodkern.pairwise_hinge(a, ood_score).exp()))(id_score)
    oracle = torch.func.jacrev(torch.func.jacrev(lambda a: all_pairs(a, ood_score).exp()))(id_score)
    torch.testing.assert_close(hessian, oracle)
