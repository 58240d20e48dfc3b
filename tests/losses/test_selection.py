"""Sums of rows of a matrix, whose gradient joins the matrix's own."""

import pytest
import torch
from oracle import allocations, like

from oodkern import _native
from oodkern.losses import _selection
from oodkern.losses._selection import Select, Spread

N, K, D = 6, 4, 3
SELECTIONS = {
    "mean": None,
    "classes": torch.tensor([2, 0, 2, 2, 3, 0]),
    "labels": torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 1, 0]]),
}


@pytest.fixture(autouse=True, params=["native", "PyTorch"])
def kernels(request, monkeypatch):
    if request.param == "PyTorch":  # as on a GPU
        monkeypatch.setitem(_native.missing, "cpu", "it is not to be used")


@pytest.fixture(params=SELECTIONS)
def selection(request):
    return SELECTIONS[request.param]


@pytest.fixture
def chosen(selection):
    """The selection as a matrix [N, K]."""
    if selection is None:
        return torch.full((1, K), 1 / K, dtype=torch.float64)
    if selection.dim() == 1:
        return torch.nn.functional.one_hot(selection, K).double()
    return selection.double()


@pytest.mark.parametrize("chunk", [1, 8, 1 << 20])
def test_each_is_the_derivative_of_the_other(monkeypatch, selection, chosen, chunk):
    monkeypatch.setattr(_selection, "CHUNK", chunk)
    matrix, rows = torch.randn(K, D, dtype=torch.float64), torch.randn(len(chosen), D, dtype=torch.float64)
    for one, other in zip(Select.apply(matrix, selection), (matrix, chosen @ matrix), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(Spread.apply(matrix, rows, selection), matrix + chosen.T @ rows)
    matrix.requires_grad_(), rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: Select.apply(m, selection), matrix)
    assert torch.autograd.gradgradcheck(lambda m: Select.apply(m, selection), matrix)
    assert torch.autograd.gradcheck(lambda m, r: Spread.apply(m, r, selection), (matrix, rows))
    assert torch.autograd.gradgradcheck(lambda m, r: Spread.apply(m, r, selection), (matrix, rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_and_rounded_once(selection, chosen, dtype):
    matrix, rows = torch.randn(K, D).to(dtype), torch.randn(len(chosen), D)
    _, sums = Select.apply(matrix, selection)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), chosen @ matrix.double(), rtol=1e-6, atol=1e-6)
    exact = matrix.double() + chosen.T @ rows.double()
    found = Spread.apply(matrix, rows, selection)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs()).all()


def test_autocast_rounds_nothing(selection):
    matrix = torch.randn(K, D, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, rows = Select.apply(matrix, selection)
            results.append((rows, *torch.autograd.grad(rows, matrix, like(rows))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_gradient_is_not_one_more_matrix(monkeypatch, selection):
    """Autograd on matrix[classes] alone fills a second one with zeros and adds it."""
    monkeypatch.setattr(_selection, "CHUNK", 2**10)
    matrix, factor = torch.randn(2**15, 2**5, requires_grad=True), torch.randn(2**15, 2**5)
    if selection is not None and selection.dim() == 2:
        selection = torch.randint(0, 2, (N, len(matrix)))

    def step():
        through, rows = Select.apply(matrix, selection)
        return torch.autograd.grad((through * factor).sum() + rows.sum(), matrix)

    made = allocations(step)
    size = matrix.numel() * 4
    assert [change for change in made if change >= size] == [size, size]  # the product and its gradient


def test_a_gradient_that_is_shared_is_left_alone(selection, chosen):
    """The gradient of a sum is one number expanded; nothing can be added to it in place."""
    matrix = torch.randn(K, D, dtype=torch.float64, requires_grad=True)
    through, rows = Select.apply(matrix, selection)
    (found,) = torch.autograd.grad(through.sum() + rows.sum(), matrix)
    torch.testing.assert_close(found, 1 + chosen.sum(0)[:, None].expand(K, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_added(dtype):
    """As index_add_ adds them, of many rows to few places and of few to many."""
    for rows, places in ((500, 7), (7, 500), (1, 1), (0, 3)):
        matrix, index = torch.randn(places, 33).to(dtype), torch.randint(0, places, (rows,))
        added = torch.randn(rows, 66, dtype=torch.promote_types(dtype, torch.float32))[:, ::2]
        exact = matrix.double().index_add_(0, index, added.double())
        torch.ops.oodkern.add_rows_(matrix, added, index)
        torch.testing.assert_close(matrix.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


def test_the_raw_op():
    matrix, rows, index = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 3, 3, 1, 0])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # traced it would run twice on one matrix
    torch.library.opcheck(torch.ops.oodkern.add_rows_.default, (matrix, rows, index), test_utils=checks)
    for arguments, message in (
        ((matrix, rows[:, :2], index), "rows: expected as many columns as the matrix"),
        ((matrix, rows.double(), index), "rows: expected as many columns as the matrix"),
        ((matrix, rows, index[:2]), "index: expected one int64 a row"),
        ((matrix, rows, index + 1), r"index: expected 0\.\.3"),
        ((matrix.T.contiguous().T, rows, index), "matrix: expected a contiguous one"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.oodkern.add_rows_(*arguments)
