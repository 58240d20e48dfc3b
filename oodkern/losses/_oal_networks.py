"""The networks that OAL's loss brings along: its parameters, trained with the student."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def common(*tensors: Tensor) -> list[Tensor]:
    """In the widest of their dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Transfer(nn.Module):
    """What the student's features are to be, of the teacher's u: BN - Linear - ReLU - BN, [N, teacher's] -> [N, D].

    Fewer than two rows have no statistics: they, and whatever comes with `running`, are normalised by the running
    statistics, which stay as they are.
    """

    def __init__(self, teacher_features: int, features: int) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(teacher_features)
        self.linear = nn.Linear(teacher_features, features)
        self.last = nn.BatchNorm1d(features)

    def forward(self, rows: Tensor, running: bool = False) -> Tensor:
        running = running or len(rows) < 2

        def normalise(norm: nn.Module, rows: Tensor) -> Tensor:
            if not running:
                return norm(rows)
            statistics: Any = norm
            affine = statistics.weight, statistics.bias
            return F.batch_norm(
                rows, statistics.running_mean, statistics.running_var, *affine, training=False, eps=statistics.eps
            )

        rows = rows.to(self.linear.weight.dtype)
        return normalise(self.last, self.linear(normalise(self.first, rows)).relu())


class Identity(nn.Module):
    """The transfer of a teacher that has the student's architecture."""

    def forward(self, rows: Tensor, running: bool = False) -> Tensor:
        return rows


class Conditional(nn.Module):
    """CLUB's q(y | x) = N(mean(x), exp(log_variance(x))), with log-variances in -1..1."""

    def __init__(self, latents: int, features: int, deep: bool) -> None:
        super().__init__()
        hidden = max(features // 2, 1)
        narrow = (max(latents // 2, 1), max(latents // 4, 1)) if deep else ()
        self.mean = perceptron(latents, *narrow, hidden, features)
        self.log_variance = nn.Sequential(*perceptron(latents, hidden, features), nn.Tanh())

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        first: Any = self.mean[0]
        rows = rows.to(first.weight.dtype)
        return self.mean(rows), self.log_variance(rows)
