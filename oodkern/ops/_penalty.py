"""The chunks of a gradient penalty: the norms of some rows, and the gradients in the leaves of their score."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oodkern.ops._checks import check_floating
from oodkern.ops._convolution import TwiceDifferentiable
from oodkern.ops._score_graph import kinks_of, leaves_of, nodes_of, opaque_of, updates_statistics
from oodkern.ops.norm import sample_norm

# Where a network computes in float16, gradients of a score in inputs and activations are too small for it. A power of
# two changes no bit of other dtypes, and what autocast does inside a score cannot be seen, so it is always there.
SCALE = 2.0**8


class Work:
    """What is done chunk by chunk, and the gradients that come of it, by leaf, in float32 at least."""

    def __init__(
        self, score_fn: Callable[[Tensor], Tensor], differentiate: bool, exact: bool, step: float, allow_kinks: bool
    ) -> None:
        self.score_fn, self.differentiate, self.step = score_fn, differentiate, step
        self.differentiates_twice = exact
        self.may_warn = not allow_kinks
        self.allow_kinks = allow_kinks
        self.gradients: dict[Tensor, Tensor] = {}

    def chunk(self, x: Tensor, weight: Tensor) -> Tensor:
        """Not a method kept as an attribute: the gradients would be in a cycle, and stay until that is collected."""
        return self.exact(x, weight) if self.differentiates_twice else self.finite_difference(x, weight)

    def score(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """The scores of some rows, and the nodes of their graph."""
        score = self.score_fn(x)
        check_score(score, len(x), "score_fn")
        nodes = nodes_of(score)
        if updates_statistics(nodes):
            raise RuntimeError(
                "score_fn: expected batch normalisation in modules, or in torch.nn.functional.batch_norm with "
                "training=False: on batch statistics rows are coupled, and running statistics were changed"
            )
        return score, nodes

    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # Checkpointed layers are computed again inside the gradients, so these stay inside too.
        with sdpa_kernel(SDPBackend.MATH):
            with TwiceDifferentiable():
                score, nodes = self.score(x)
            leaves = leaves_of(nodes, x) if self.differentiate else []
            norm = sample_norm(input_gradient(score, x, "score_fn", create_graph=bool(leaves))) * (1 / SCALE)
            total = (weight * norm).sum()
            del score, nodes, norm
            # The cotangent of the gradients, w u of many small numbers, is brought near 1.
            near_one = math.sqrt(max(x[0].numel(), 1)) / float(weight.abs().sum())
            self.accumulate(total, leaves, SCALE * power_of_two(near_one))
        return total.detach()

    def finite_difference(self, x: Tensor, weight: Tensor) -> Tensor:
        random = RandomState(x)
        score, nodes = self.score(x)
        self.check_sight(score, nodes)
        gradient = input_gradient(score, x, "score_fn")
        del score, nodes
        scaled_norm = sample_norm(gradient)
        total = (weight * scaled_norm).sum() * (1 / SCALE)
        if not self.differentiate:
            return total
        with torch.no_grad():
            size = sample_norm(x)
            h = self.step * torch.where(size > 0, size, 1.0)
            shape = (-1, *(1,) * (x.dim() - 1))
            inverse = torch.where(scaled_norm > 0, 1 / scaled_norm, 0.0)
            gradient = gradient * (h * inverse).view(shape)
            slope = weight / (2 * h)
        scale = power_of_two(SCALE / float(slope.abs().sum()))
        # One side after the other: only one graph is held.
        for side in (1.0, -1.0):
            random.restore()
            score, nodes = self.score(torch.add(x.detach(), gradient, alpha=side))
            self.accumulate((side * slope * score).sum(), leaves_of(nodes, x), scale)
            del score, nodes
        return total

    def check_sight(self, score: Tensor, nodes: list[Any]) -> None:
        if score.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"score_fn: expected float32 scores, of which finite differences are taken, got {name_of(score.dtype)}"
            )
        if self.allow_kinks:
            return
        if kinks := kinks_of(nodes):
            raise RuntimeError(
                f"second_order='finite_difference' expects a smooth score, and the graph of this one has "
                f"{', '.join(kinks)}, whose first or second derivative jumps: what is estimated there is not the "
                "gradient. Take second_order='exact', smooth activations (SiLU, GELU), or allow_kinks=True to have it "
                "all the same."
            )
        if self.may_warn and (opaque := opaque_of(nodes)):
            self.may_warn = False
            warnings.warn(
                f"second_order='finite_difference' cannot see into {', '.join(opaque)}: where there is a ReLU or a "
                "max-pooling inside, the estimate is not the gradient. allow_kinks=True leaves this warning out.",
                RuntimeWarning,
                stacklevel=5,
            )

    def accumulate(self, total: Tensor, leaves: list[Tensor], scale: float) -> None:
        if not leaves or not total.requires_grad:
            return
        for leaf, gradient in zip(leaves, torch.autograd.grad(total * scale, leaves, allow_unused=True), strict=True):
            if gradient is None:
                continue
            if gradient.dtype in (torch.float16, torch.bfloat16):
                gradient = gradient.float()
            if leaf in self.gradients:
                self.gradients[leaf].add_(gradient, alpha=1 / scale)
            else:
                self.gradients[leaf] = gradient * (1 / scale)


class RandomState:
    """Of the generators that a function of x may draw from."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(x.device) if x.is_cuda else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def power_of_two(near: float) -> float:
    """2^n near a positive number; 1 for what is none."""
    return 2.0 ** round(math.log2(near)) if 1e-30 < near < 1e30 else 1.0


def input_gradient(score: Tensor, inputs: Tensor, name: str, create_graph: bool = False, **keep: bool) -> Tensor:
    """d score_i / d inputs_i, times SCALE."""
    if not score.requires_grad:
        raise ValueError(f"{name}: expected a score with a graph, got one without: was it computed under no_grad?")
    upstream = torch.full_like(score, SCALE)
    (gradient,) = torch.autograd.grad(score, inputs, upstream, create_graph=create_graph, allow_unused=True, **keep)
    if gradient is None:
        raise ValueError(f"{name}: expected a score that depends on the inputs, and no gradient leads there")
    return gradient


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_score(score: Any, rows: int, name: str) -> None:
    check_floating(score, name)
    if tuple(score.shape) != (rows,):
        raise ValueError(f"{name}: expected scores [{rows}], one a row of inputs, got {list(score.shape)}")
