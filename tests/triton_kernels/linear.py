"""What tests of `linear_energy` compare: ours, the oracle, eager PyTorch, and what their roundings scale with."""

from __future__ import annotations

import torch
from judge import randn

import oodkern
from oodkern import reference


def head(N, K, D, dtype=torch.float32, bias=True, seed=0):
    weight = randn(K, D, dtype=dtype, seed=seed + 1)
    return randn(N, D, dtype=dtype, seed=seed), weight, randn(K, dtype=dtype, seed=seed + 2) if bias else None


def ours(score, temperature):
    def function(*inputs):
        with oodkern.backend("triton"):
            if score == "energy":
                return oodkern.linear_energy(*inputs, temperature=temperature)
            return oodkern.linear_joint_energy(*inputs)

    return function


def oracle(score, temperature):
    if score == "energy":
        return lambda *inputs: reference.linear_energy(*inputs, temperature=temperature)
    return reference.linear_joint_energy


def eager(score, temperature):
    def function(*inputs):
        z = torch.nn.functional.linear(*inputs)
        if score == "energy":
            return -temperature * torch.logsumexp(z / temperature, -1).float()
        return -torch.nn.functional.logsigmoid(-z).float().sum(-1)

    return function


def derivatives(function, inputs, upstream, cotangents):
    """[value, gradients, then of the gradients along the cotangents: that of the upstream and those of the inputs]."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    upstream = upstream.to(value.dtype).requires_grad_()
    gradients = torch.autograd.grad(value, inputs, upstream, create_graph=True)
    cotangents = [t.to(gradient.dtype) for t, gradient in zip(cotangents, gradients, strict=True)]
    second = torch.autograd.grad(gradients, [upstream, *inputs], cotangents)
    return [tensor.detach() for tensor in (value, *gradients, *second)]


def sizes(score, temperature, inputs, upstream, cotangents):
    """What the roundings of each of `derivatives` scale with: sums of the magnitudes of what is added."""
    x, w, *b = (tensor.double() for tensor in inputs)
    v, u, *c = (tensor.double().abs() for tensor in cotangents)
    z = reference.linear(x, w, b[0] if b else None)
    x, w, g = x.abs(), w.abs(), upstream.double().abs()[:, None]
    absolute = x @ w.T + (b[0].abs() if b else 0.0)
    t = v @ w.T + x @ u.T + (c[0] if c else 0.0)
    p = (z / temperature).softmax(-1) if score == "energy" else z.sigmoid()
    along = (p * t).sum(-1)
    q = p * (t + along[:, None]) / temperature if score == "energy" else p * t
    p, q = g * p, g * q
    value = absolute.amax(-1) if score == "energy" else torch.nn.functional.softplus(z).sum(-1)
    first = [p @ w, p.T @ x, p.sum(0)]
    second = [q @ w + p @ u, q.T @ x + p.T @ v, q.sum(0)]
    n = len(inputs)
    return float(absolute.max() / temperature), [value, *first[:n], along, *second[:n]]
