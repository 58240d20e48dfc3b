"""Room `contrast`: CLUB."""

import pytest
import torch
from bar_product import ProductBar
from bar_product_pytorch import ProductOp
from layouts import FLOATS
from oracle import like, value_and_gradients
from pairs import dense, judge_club, same

import oodkern
from oodkern import _native, reference

# More rows and more columns than a part has; rows that leave a rest of the 16 that are added up in float32.
SIZES = [(5, 3), (7, 33), (2, 1), (1030, 5), (65, 300), (514, 20), (33, 129)]


def as_usually_written(mean, log_variance, target):
    difference = target.square().mean(0) - target.square() + 2 * mean * (target - target.mean(0))
    return (difference / (2 * log_variance.exp())).sum(-1).mean()


def raw_club(inputs):
    return tuple(inputs)


def raw_backward(inputs, needs=(True, True, True)):
    value, columns = torch.ops.oodkern.club(*inputs)
    return (like(value), *inputs, columns, *needs)


def raw_backward_of_some(inputs):
    return raw_backward(inputs, (False, True, False))


class TestClub(ProductBar):
    op = ProductOp(
        oodkern.club,
        reference.club,
        dense,
        [same(*sizes) for sizes in SIZES],
        make=same,
        order=1,
        scale=1.0,
        autocasts=False,
        bytes_per_row=32,  # what is added up of 512 rows, five doubles a column
        raw_products=[("club", raw_club), ("club_backward", raw_backward), ("club_backward", raw_backward_of_some)],
    )
    test_nan_stays_in_its_row = None  # one number of all rows
    test_logits_are_never_rounded = None  # cancels: judged by its terms

    def compare(self, inputs, order):
        judge_club(inputs)

    @pytest.mark.parametrize("offset", [1e3, -3e4])
    def test_far_from_zero(self, dtype, offset):
        if dtype == torch.float16 and abs(offset) > 1e4:
            offset = 2e3
        for N, D in SIZES:
            mean, log_variance, target = self.op.inputs(same(N, D), torch.float64)
            self.compare([(mean + offset).to(dtype), log_variance.to(dtype), (target + offset).to(dtype)], 1)

    def test_columns_of_different_means(self, dtype):
        mean, log_variance, target = self.op.inputs(same(200, 140), torch.float64)
        shift = torch.linspace(-2000, 2000, 140, dtype=torch.float64)
        self.compare([(mean + shift).to(dtype), log_variance.to(dtype), (target + shift).to(dtype)], 1)

    def test_first_row_far_from_the_others(self, dtype):
        mean, log_variance, target = self.op.inputs(same(600, 20), torch.float64)
        target[0] += 1e3
        self.compare([mean.to(dtype), log_variance.to(dtype), target.to(dtype)], 1)

    def test_large_and_small_variances(self, dtype):
        mean, log_variance, target = self.op.inputs(same(40, 20), torch.float64)
        self.compare([mean.to(dtype), (log_variance * 10).to(dtype), target.to(dtype)], 1)


def test_reference_is_the_definition():
    tensors = [torch.randn(40, 7, dtype=torch.float64).requires_grad_() for _ in range(3)]
    a, b = reference.club(*tensors), dense(*tensors)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for x, y in zip(torch.autograd.grad(a, tensors), torch.autograd.grad(b, tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    leaves = [t.detach()[:5, :3].clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(reference.club, leaves)


def test_does_not_cancel_as_the_usual_form_does():
    mean, log_variance, target = (torch.randn(500, 64) for _ in range(3))
    mean, target = mean + 1e3, target + 1e3
    exact = dense(mean.double(), log_variance.double(), target.double())
    assert (oodkern.club(mean, log_variance, target) - exact).abs() < 2e-5
    assert (as_usually_written(mean, log_variance, target) - exact).abs() > 0.01


def test_random_pairs_have_no_information():
    """Over all pairings of rows the mean is 0, whatever q is: every (i, j) takes its turn."""
    mean, log_variance, target = (torch.randn(6, 4, dtype=torch.float64) for _ in range(3))
    rolled = torch.stack([oodkern.club(mean, log_variance, target.roll(k, 0)) for k in range(6)])
    assert rolled.abs().max() > 0.1
    torch.testing.assert_close(rolled.mean(), torch.zeros(()).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_at_the_ends_of_their_range(dtype):
    limit = torch.tensor([-torch.inf, torch.inf, 200.0, -200.0, 0.0], dtype=dtype)
    mean, target = torch.ones(2, 5, dtype=dtype), torch.tensor([[3.0], [1.0]], dtype=dtype).expand(2, 5)
    for i, log_variance in enumerate(limit):
        leaves = [t[:, :1].clone().requires_grad_() for t in (mean, log_variance.expand(2, 5), target)]
        value = oodkern.club(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        if i == 0:
            assert not value.isfinite()
        if i == 1:
            assert value == 0
            assert all((g == 0).all() for g in gradients)
        if i == 2:
            assert 0 <= abs(value.item()) < 1e-37
        if i == 3 and dtype != torch.float64:
            assert not value.isfinite()
        if i == 4:
            torch.testing.assert_close(value.double(), dense(*[t.detach().double() for t in leaves]))


def test_nan_reaches_the_value_and_its_column():
    tensors = [torch.randn(50, 300) for _ in range(3)]
    for which in range(3):
        dirty = [t.clone() for t in tensors]
        dirty[which][7, 200] = torch.nan
        results = value_and_gradients(oodkern.club, dirty)
        assert results[0].isnan()
        others = torch.arange(300) != 200
        for a, b in zip(results[1:], value_and_gradients(oodkern.club, tensors)[1:], strict=True):
            assert torch.equal(a[:, others], b[:, others])


def test_empty_keeps_the_graph():
    for shape in ((0, 4), (3, 0), (0, 0)):
        leaves = [torch.empty(shape).requires_grad_() for _ in range(3)]
        value = oodkern.club(*leaves)
        assert value == 0
        assert value.requires_grad
        for gradient in torch.autograd.grad(value, leaves):
            assert gradient.shape == shape


def test_any_number_of_threads_gives_the_same_bits():
    tensors = [torch.randn(1500, 300) for _ in range(3)]
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_gradients(oodkern.club, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_takes_mixed_dtypes_without_rounding():
    mean, log_variance, target = (torch.randn(9, 4) for _ in range(3))
    mean = mean.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = oodkern.club(mean, log_variance, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, oodkern.club(mean.float(), log_variance, target), rtol=0, atol=0)
    assert torch.autograd.grad(value, mean)[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="log_variance: expected bfloat16 as mean are, got float32"):
        oodkern.club(mean, log_variance, target)


def test_other_backends_and_raw_checks():
    tensors = [torch.randn(6, 3) for _ in range(3)]
    with oodkern.backend("reference"):
        torch.testing.assert_close(oodkern.club(*tensors), dense(*tensors))
    with oodkern.backend("triton"), pytest.raises(RuntimeError, match="cannot compute `club` on cpu"):
        oodkern.club(*tensors)
    ops = torch.ops.oodkern
    with pytest.raises(RuntimeError, match="log_variance: expected the shape and dtype of mean"):
        ops.club(tensors[0], tensors[1][:, :2], tensors[2])
    with pytest.raises(RuntimeError, match="columns: expected what club gave"):
        ops.club_backward(torch.ones(()), *tensors, torch.ones(4, 3), True, True, True)
    with pytest.raises(RuntimeError, match="grad: expected one number"):
        ops.club_backward(torch.ones(2), *tensors, torch.ones(5, 3), True, True, True)
    assert _native.instruction_sets()
