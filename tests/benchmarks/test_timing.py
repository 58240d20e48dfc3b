"""Times: medians and quartiles of turns that works take one after the other."""

import itertools
import time

import pytest
import torch

from oodkern.benchmarks.timing import SHORTEST, CPUClock, Times, interleaved

CPU = torch.device("cpu")
LONG = 2 * SHORTEST  # one call a turn


def logging(log, seconds):
    def work_of(name):
        def work():
            log.append(name)
            time.sleep(seconds)

        return work

    return {name: work_of(name) for name in "abc"}


def test_median_and_quartiles():
    times = Times((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (times.median, times.quartiles) == (3.0, (2.0, 4.0))
    assert Times((1.0, 2.0)).quartiles == (1.25, 1.75)
    assert Times((7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(("fewest", "most", "seconds", "turns"), [(3, 9, 0.0, 3), (1, 4, 1e9, 4), (5, 5, 0.0, 5)])
def test_works_take_turns(fewest, most, seconds, turns):
    log: list[str] = []
    times = interleaved(logging(log, LONG), CPU, seconds, fewest, most)
    assert log[:6] == list("aabbcc"), "twice each before: to warm up, and to count the calls of a turn"
    assert [sorted(log[i : i + 3]) for i in range(6, len(log), 3)] == [list("abc")] * turns
    assert {name: len(one.seconds) for name, one in times.items()} == dict.fromkeys("abc", turns)
    assert all(second >= LONG for one in times.values() for second in one.seconds)


def test_nobody_always_comes_after_the_same_one():
    log: list[str] = []
    interleaved(logging(log, LONG), CPU, 0.0, fewest=12)
    turns = ["".join(log[i : i + 3]) for i in range(6, len(log), 3)]
    assert len(set(turns)) >= 4
    again: list[str] = []
    interleaved(logging(again, LONG), CPU, 0.0, fewest=12)
    assert again == log, "runs are comparable"


def test_no_more_turns_than_the_seconds_hold():
    """A loaded machine sleeps longer, and makes fewer."""
    times = interleaved(logging([], 0.005), CPU, 0.3, fewest=1, most=1000)
    assert 3 <= len(times["a"].seconds) <= 20


def test_short_works_are_called_several_times_a_turn():
    log: list[str] = []
    times = interleaved(logging(log, SHORTEST / 20), CPU, 0.0, fewest=3)
    calls = {name: (log.count(name) - 2) / 3 for name in "abc"}
    assert all(3 <= count <= 20 for count in calls.values())
    blocks = [(name, len(list(block))) for name, block in itertools.groupby(log[6:])]
    assert all(length % calls[name] == 0 for name, length in blocks), "as many every turn, and together"
    assert all(SHORTEST / 20 <= second < SHORTEST for one in times.values() for second in one.seconds), "one call's"


def test_the_clock_counts_no_time_of_freeing():
    """What one call returned lives until the clock has stopped."""
    freed = []

    class Result:
        def __del__(self):
            time.sleep(0.05)
            freed.append(True)

    assert CPUClock()(Result, 1) < 0.05
    assert freed == [True]
