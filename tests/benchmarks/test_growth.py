"""Sweeps over a size, and the exponents of what grows with it."""

import sys

import pytest
import torch
from benchmarks.planted import MB, memory, scores

from oodkern.benchmarks.case import OURS, Contender
from oodkern.benchmarks.growth import FLOOR_BYTES, Growth, Sweep, exponent, fitting, measure_growth
from oodkern.benchmarks.memory import Peak
from oodkern.benchmarks.timing import Times

SIZES = (100, 300, 1_000, 3_000, 10_000)


def growth(seconds, beyond=None):
    peaks = None if beyond is None else tuple(Peak(int(one) + 50, 50) for one in beyond)
    return Growth(SIZES, tuple(Times((one,)) for one in seconds), peaks)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_exponent_of_a_power(power):
    assert exponent(SIZES, [3.7 * size**power for size in SIZES]) == pytest.approx(power, abs=1e-12)


def test_time_counts_in_the_last_decade():
    """What calls cost, whatever the size, hides what grows below it."""
    assert growth([1.0, 1.0, 1.0, 3.0, 10.0]).time_exponent == pytest.approx(1.0, abs=1e-12)
    assert growth([size**2 for size in SIZES]).time_exponent == pytest.approx(2.0)


def test_memory_counts_from_a_mebibyte_on():
    assert growth(SIZES).memory_exponent is None
    assert growth(SIZES, [1_000 * one for one in range(5)]).memory_exponent == 0.0
    assert growth(SIZES, [FLOOR_BYTES * size for size in SIZES]).memory_exponent == pytest.approx(1.0)


def test_wrong_sweeps():
    one = scores(N=10)
    with pytest.raises(ValueError, match=r"axis: expected one of N, D, K, got 'M'"):
        Sweep(one, "M", (1, 2, 3))
    for values in ((1, 2), (1, 3, 2), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"values: expected three or more that ascend, got"):
            Sweep(one, "N", values)


def test_a_sweep_is_measured_at_its_values():
    sweep = Sweep(scores(N=10, D=4, K=3), "D", (4, 8, 16))
    assert [case.sizes for case in sweep.cases] == [{"N": 10, "D": size, "K": 3} for size in (4, 8, 16)]
    assert sweep.name == "planted: scores, backward against D, N=10, K=3, float64"
    found = measure_growth(sweep, torch.device("cpu"), 0.0, fewest=1, memory=False)
    assert list(found) == ["oodkern", "eager"], "third parties are left out"
    assert [len(one.times) for one in found.values()] == [3, 3]
    assert found["oodkern"].memory_exponent is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux keeps the peak that is read")
def test_memory_of_a_sweep():
    """Every value has its own function, which here knows the size, and one process has all of them."""
    found = measure_growth(Sweep(memory(result=1), "temporary", (4, 16, 64)), torch.device("cpu"), 0.0)
    ours, untouched = (found[name] for name in ("oodkern", "eager"))
    assert ours.times[2].median > 4 * ours.times[0].median
    assert [peak.beyond for peak in ours.peaks] == pytest.approx([4 * MB, 16 * MB, 64 * MB], abs=1.5 * MB)
    assert ours.memory_exponent == pytest.approx(1.0, abs=0.1)
    assert untouched.memory_exponent == 0.0


def test_who_has_not_enough_memory_for_the_largest_is_left_out():
    def fail(*inputs):
        raise torch.OutOfMemoryError("80 GB")

    one = scores(N=10)
    names = [OURS, "eager"]
    assert fitting(one, names, {}, torch.device("cpu")) == names
    one.contenders["eager"] = Contender(fail)
    assert fitting(one, names, {}, torch.device("cpu")) == [OURS]
    one.contenders[OURS] = Contender(fail)
    with pytest.raises(torch.OutOfMemoryError):
        fitting(one, names, {}, torch.device("cpu"))
