"""The memory that is given, and the largest size that fits into it."""

import pytest

from oodkern.config import ConfigError
from oodkern.training.fitting import first_true, largest_fitting, parse_memory


@pytest.mark.parametrize("limit", [100, 106, 107, 1000, 2514, 2515, 6001, 90_000, 1e9])
@pytest.mark.parametrize(
    "size",
    [
        lambda n: 100 + 7 * n,
        lambda n: max(1000, 3 * n),
        lambda n: 50 * (n // 32) + n,
        lambda n: n**2,
        lambda n: n if n <= 700 else float("inf"),
    ],
)
def test_the_largest_that_fits(size, limit):
    expected = max((n for n in range(1, 5001) if size(n) <= limit), default=0)
    for start in (1, 64, 400, 4999):
        tried = set()
        found = largest_fitting(lambda n, tried=tried: tried.add(n) or size(n), limit, 1, 5000, start)
        assert found == expected
        assert (min(tried) >= 1, max(tried) <= 5000, len(tried) < 24) == (True, True, True)


@pytest.mark.parametrize("most", [1, 2, 3, 64, 65, 1000])
def test_the_first_that_holds(most):
    for first in {1, 2, 3, most // 2 + 1, most - 1, most} & set(range(1, most + 1)):
        asked = []
        assert first_true(lambda n, asked=asked, first=first: asked.append(n) or n >= first, most) == first
        assert len(asked) <= 20
        assert most not in asked


def test_memory_is_read_strictly():
    assert [parse_memory(text) for text in ("80GiB", "1.5 MiB", "2GB", "3MB", "1TiB", "0.5TB")] == [
        80 << 30,
        3 << 19,
        2 * 10**9,
        3 * 10**6,
        1 << 40,
        5 * 10**11,
    ]
    for text in ("80", "80G", "GiB", "-1GiB", "0GiB", "1e3MiB", "80 gib", "1,5GiB", "infGiB", ""):
        with pytest.raises(
            ConfigError, match="--memory: expected a positive number with TiB, GiB, MiB, TB, GB, MB"
        ) as error:
            parse_memory(text)
        assert repr(text) in str(error.value)
