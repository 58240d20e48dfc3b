"""What `linear_scores` makes of one exponential an element: logits of every size, in every block of a row."""

import pytest
import torch

import oodkern
from oodkern import _native, reference


def scores_of(z, dtype=torch.float32):
    """Of given logits [N, K], as the biases of heads without features, a row at a time."""
    results = [
        oodkern.linear_scores(torch.zeros(1, 0, dtype=dtype), torch.zeros(len(row), 0, dtype=dtype), row) for row in z
    ]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("K", [1, 5, 16, 100, 1024, 1100, 3000])
@pytest.mark.parametrize("spread", [0.1, 4.0, 40.0])
def test_every_size_of_logits(K, spread):
    """Down to the smallest normal number joint_energy keeps its digits, whichever way the products take."""
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            for top in (-86, -79.5, -30, -5, -0.1, 0, 9.9, 10.1, 20.9, 21.1, 41.9, 42.1, 88, 500):
                z = top - spread * torch.rand(2, K)
                z[1, K // 2] = top  # the largest, elsewhere
                energy, joint, largest, index, msp = scores_of(z)
                low, exact, maximum, place, share = _exact(z)
                torch.testing.assert_close(energy.double(), low, rtol=1e-6, atol=1e-6)
                subnormal = K * torch.finfo(torch.float32).tiny  # terms below it count as 0
                torch.testing.assert_close(joint.double(), exact, rtol=2e-6, atol=subnormal)
                assert torch.equal(largest, maximum)
                assert torch.equal(index, place)
                torch.testing.assert_close(msp.double(), share, rtol=3e-6, atol=0)


def _exact(z):
    wide = z.double()
    maximum, place = z.max(1)
    low = reference.energy(wide)
    return low, reference.joint_energy(wide), maximum, place, (wide.amax(1) + low).exp()


def test_many_small_terms_beside_a_large_one():
    """1 + exp(-17) is 1 in float32 but for a rounding; a hundred thousand of them are not nothing."""
    z = torch.full((1, 100_000), -17.0)
    z[0, 3] = 0.5
    torch.testing.assert_close(scores_of(z)[1].double(), reference.joint_energy(z.double()), rtol=1e-6, atol=0)


def test_infinities_and_nan_in_any_block():
    z = torch.randn(9, 2500)
    z[0] = -torch.inf
    z[1, :1024] = -torch.inf
    z[2, 1500] = torch.inf
    z[3, 2400] = torch.nan
    z[4, 10], z[4, 1700] = torch.nan, torch.nan
    z[5, 10], z[5, 1700] = torch.inf, torch.nan
    z[6, 1024:] = -torch.inf
    z[7, 2100], z[7, 30] = torch.inf, torch.inf
    energy, joint, largest, index, msp = scores_of(z)
    low, exact, maximum, place, _ = _exact(z)
    torch.testing.assert_close(energy.double(), low, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(joint.double(), exact, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(largest, maximum, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, place)
    assert msp.isnan().tolist() == [True, False, True, True, True, True, False, True, False]


def test_what_lies_behind_a_row_does_not_count():
    """Rows are read to a full register; what a wider head left there before is not seen."""
    x = torch.randn(600, 8)
    wide, narrow = torch.full((37, 8), torch.nan), torch.randn(33, 8)
    alone = oodkern.linear_scores(x, narrow)
    oodkern.linear_scores(x, wide)
    assert all(torch.equal(a, b) for a, b in zip(alone, oodkern.linear_scores(x, narrow), strict=True))
