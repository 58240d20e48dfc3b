"""The local certified radius of a score."""

import math

import pytest
import torch
from torch import nn

import oodkern
from oodkern.certificate import certified_radius


def network(*middle):
    """Images [N, 3, 4, 4] to scores [N]."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), *middle, nn.Linear(32, 5)).eval()
    return layers, lambda images: oodkern.energy(layers(images))


def test_exact_for_a_linear_score():
    """Just inside the radius the verdict stays, just outside it turns; and nowhere nearer in any other direction."""
    weight = torch.randn(3, 4, 4, dtype=torch.float64)

    def score(images):
        return (images * weight).flatten(1).sum(1) + 0.3

    images = torch.randn(20, 3, 4, 4, dtype=torch.float64)
    threshold = 0.7
    radius, norm, found = certified_radius(score, images, threshold)
    assert torch.equal(found, score(images))
    torch.testing.assert_close(norm, weight.norm().expand(20))
    accepted = found <= threshold
    assert accepted.any()
    assert not accepted.all()
    assert torch.equal(radius > 0, accepted)
    step = radius[:, None, None, None] * weight / weight.norm()  # up for what is accepted, down for what is flagged
    assert torch.equal(score(images + step * 0.999) <= threshold, accepted)
    assert torch.equal(score(images + step * 1.001) <= threshold, ~accepted)
    other = torch.randn(200, 1, 3, 4, 4, dtype=torch.float64)
    other = 0.999 * other / other.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) * radius[:, None, None, None]
    for direction in other:
        assert torch.equal(score(images + direction) <= threshold, accepted)


def test_first_order_of_a_network():
    """Near the threshold the score along the gradient crosses it at the radius, the better the nearer."""
    layers, score = network(nn.Tanh())
    layers.double()
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    found = score(images).detach()
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    norm = gradient.flatten(1).norm(dim=1)
    wrong = []
    for margin in (1e-2, 1e-3):
        for sign in (1, -1):
            thresholds = found + sign * margin
            for i in range(6):
                radius, own_norm, _ = certified_radius(score, images[i : i + 1], float(thresholds[i]))
                torch.testing.assert_close(own_norm, norm[i : i + 1])
                reached = score(images[i : i + 1] + radius * gradient[i] / norm[i])
                wrong.append((reached - thresholds[i]).abs().item() / margin**2)
    assert max(wrong) < 5  # the error is of second order


def test_a_bound_by_the_lipschitz_constant():
    """||grad|| of s(x) = |x|^2 / 2 is largest on the ball's rim: what the docstring calls a lower bound is one there,
    and not at x, which is the heuristic."""
    images = torch.tensor([[3.0, 0.0]])
    radius, norm, score = certified_radius(lambda x: x.square().sum(1) / 2, images, 12.5)
    assert (norm.item(), score.item()) == (3.0, 4.5)
    assert radius.item() == pytest.approx(8 / 3)
    true = 5.0 - 3.0
    assert (12.5 - 4.5) / 5.0 < true < radius.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_one_pass(dtype):
    layers, score = network(nn.BatchNorm1d(32), nn.ReLU())
    layers.to(dtype)
    images = torch.randn(23, 3, 4, 4).to(dtype)
    whole = certified_radius(score, images, -1.5)
    for batch in (1, 5, 23):
        sizes = []

        def seen(x, sizes=sizes):
            sizes.append(len(x))
            return score(x)

        for one, other in zip(certified_radius(seen, images, -1.5, batch=batch), whole, strict=True):
            assert one.dtype == torch.float32
            assert not one.requires_grad
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert sizes == [batch] * (23 // batch) + [23 % batch] * (23 % batch > 0)


def test_nothing_is_left_behind():
    layers, score = network(nn.ReLU())
    images = torch.randn(4, 3, 4, 4)
    with torch.no_grad():  # as in an evaluation
        radius = certified_radius(score, images, 0.0).radius
        assert not torch.is_grad_enabled()
    assert radius.isfinite().all()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in layers.parameters())
    assert not images.requires_grad
    leaf = images.clone().requires_grad_()
    assert torch.equal(certified_radius(score, leaf, 0.0).radius, radius)
    assert leaf.grad is None


def test_no_gradient_and_the_threshold_itself():
    """Below, at and above a threshold of 1, where the score is flat and where it is not."""
    images = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, math.nan])
    slope = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0])
    radius, norm, _ = certified_radius(lambda x: x.detach() + slope * (x - x.detach()), images, 1.0)
    assert norm.tolist() == slope.tolist()
    assert radius[:6].tolist() == [math.inf, math.inf, -math.inf, 0.5, 0.0, -0.5]
    assert radius[6].isnan()


def test_no_images():
    def never(images):
        raise AssertionError

    for part in certified_radius(never, torch.empty(0, 3, 4, 4), 0.0):
        assert (part.shape, part.dtype) == ((0,), torch.float32)


def test_errors():
    images = torch.randn(3, 4)

    def score(x):
        return x.sum(1)

    with pytest.raises(TypeError, match=r"images: expected one of .* got uint8"):
        certified_radius(score, images.to(torch.uint8), 0.0)
    with pytest.raises(ValueError, match=r"images: expected \[N, ...\]"):
        certified_radius(score, torch.tensor(1.0), 0.0)
    for wrong in (torch.tensor(1.0), "1", True):
        with pytest.raises(TypeError, match="threshold: expected a number"):
            certified_radius(score, images, wrong)
    with pytest.raises(ValueError, match="threshold: expected a number, got nan"):
        certified_radius(score, images, math.nan)
    with pytest.raises(ValueError, match="batch: expected 1 or more, got 0"):
        certified_radius(score, images, 0.0, batch=0)
    with pytest.raises(ValueError, match=r"score_fn: expected scores \[3\], one a row of inputs, got \[3, 4\]"):
        certified_radius(lambda x: x, images, 0.0)
    with pytest.raises(ValueError, match="score: expected a score with a graph"):
        certified_radius(lambda x: x.detach().sum(1), images, 0.0)
