"""One call or more of every host function, so that every kernel and every row of the table of tiles is launched.

`aot.py` records and compiles these launches for GPUs, `test_every_kernel.py` runs them under the interpreter. A room
adds a function with `@case`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oodkern.triton_kernels import _host, contrast, linear_energy, select, subspace

CASES: list[Callable[[Numbers], None]] = []


class Numbers:
    """Arguments of a call. `few` and `many` rows are with and without a split of the classes."""

    def __init__(self, dtype: torch.dtype, tile_rows: int, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.few, self.many = tile_rows + 3, 5 * tile_rows - 3
        self.aligned = True

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Random [rows, columns] in the dtype; `aligned` says whether a tensor descriptor can be made of it."""
        padding = 0 if self.aligned else 1
        return torch.randn(rows, columns + padding, device=self.device).to(self.dtype)[:, :columns]

    def vector(self, length: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(length, device=self.device).to(dtype or self.dtype)


def case(function: Callable[[Numbers], None]) -> Callable[[Numbers], None]:
    CASES.append(function)
    return function


@case
def linear_score(numbers: Numbers) -> None:
    for score in ("energy", "joint_energy"):
        for rows, classes in ((numbers.few, 130), (numbers.many, 130), (numbers.many, 50))[score != "energy" :]:
            head = numbers.matrix(rows, 64), numbers.matrix(classes, 64), numbers.vector(classes)
            linear_energy.linear_score(score, *head, 1.5)


@case
def linear_score_unaligned(numbers: Numbers) -> None:
    if numbers.dtype == torch.float32:  # which takes no descriptors, aligned or not
        return
    numbers.aligned = False
    linear_energy.linear_score("energy", numbers.matrix(numbers.many, 48), numbers.matrix(130, 48), None, 1.0)


@case
def linear_scores(numbers: Numbers) -> None:
    for rows, classes in ((numbers.few, 130), (numbers.many, 130), (numbers.many, 50)):
        linear_energy.linear_scores(numbers.matrix(rows, 64), numbers.matrix(classes, 64), numbers.vector(classes))


@case
def linear_derivatives(numbers: Numbers) -> None:
    for score in ("energy", "joint_energy"):
        for classes in (130, 50):
            features, weight, bias = (
                numbers.matrix(numbers.few, 64),
                numbers.matrix(classes, 64),
                numbers.vector(classes),
            )
            of_row = [numbers.vector(numbers.few, torch.float32) for _ in range(2)]
            arguments = of_row[0], features, weight, bias, of_row[1], 1.5, True, True, True
            linear_energy.linear_score_backward(score, *arguments)
            cotangents = torch.randn_like(features), torch.randn_like(weight), torch.randn_like(bias)
            linear_energy.linear_score_double_backward(score, *cotangents, *arguments)


@case
def linear_derivatives_unaligned(numbers: Numbers) -> None:
    if numbers.dtype == torch.float32:  # which takes no descriptors, aligned or not
        return
    numbers.aligned = False
    features, weight = numbers.matrix(numbers.few, 48), numbers.matrix(130, 48)
    of_row = [numbers.vector(numbers.few, torch.float32) for _ in range(2)]
    arguments = of_row[0], features, weight, None, of_row[1], 1.5, True, True, False
    linear_energy.linear_score_backward("energy", *arguments)
    linear_energy.linear_score_double_backward("energy", features, weight, None, *arguments)


@case
def full_product(numbers: Numbers) -> None:
    if numbers.dtype == torch.float32:
        for columns in (64, 130):
            _host.full_product(numbers.matrix(numbers.few, 64).T, numbers.matrix(numbers.few, columns))


@case
def alignment(numbers: Numbers) -> None:
    for rows, classes in ((numbers.few, 130), (numbers.many, 50)):
        features, weight = numbers.matrix(rows, 64), numbers.matrix(classes, 64)
        subspace.alignment(features, weight)
        subspace.alignment_backward(numbers.vector(rows, torch.float32), features, weight, True, True)


@case
def subspace_energy(numbers: Numbers) -> None:
    for columns, rank in ((64, 5), (96, 70)):
        features, basis = numbers.matrix(numbers.few, columns), numbers.matrix(columns, rank)
        of_row = [numbers.vector(numbers.few, torch.float32) for _ in range(2)]
        for given in (basis, basis.float()):
            subspace.subspace_energy(features, given)
            subspace.subspace_energy_backward(*of_row, features, given, True, True)
            cotangents = torch.randn_like(features), torch.randn_like(given)
            subspace.subspace_energy_double_backward(*cotangents, *of_row, features, given, True, True)


def info_nce_of(numbers: Numbers, rows: int, normalize: bool, symmetric: bool) -> None:
    queries, keys = numbers.matrix(rows, 64), numbers.matrix(rows, 64)
    grad = numbers.vector(rows, torch.float32)
    index = torch.arange(rows, device=numbers.device)
    temperature = torch.full((), 0.5, device=numbers.device)
    for positives in ((index, None, None), (None, index // 3, index // 2)):
        arguments = queries, keys, *positives, temperature
        _, *lse = contrast.info_nce(*arguments, normalize, symmetric)
        for wanted in (True, False):
            contrast.info_nce_backward(grad, *arguments, *lse, normalize, symmetric, wanted, wanted)


@case
def info_nce(numbers: Numbers) -> None:
    for both in (True, False):  # the most and the fewest registers
        info_nce_of(numbers, numbers.few, normalize=both, symmetric=both)


@case
def info_nce_few(numbers: Numbers) -> None:
    info_nce_of(numbers, 50, True, True)


@case
def info_nce_unaligned(numbers: Numbers) -> None:
    if numbers.dtype == torch.float32:  # which takes no descriptors, aligned or not
        return
    numbers.aligned = False
    for rows in (numbers.few, 50):
        info_nce_of(numbers, rows, True, True)


@case
def nearest_center(numbers: Numbers) -> None:
    for centers, aligned in ((130, True), (50, True), (50, False)):
        numbers.aligned = aligned
        select.nearest_center(numbers.matrix(numbers.few, 64), numbers.matrix(centers, 64))
