"""The emulator itself: correct kernels pass in every order of their threads, planted faults are caught in every one."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from emulate import LIBRARY, ORDERS, SANITIZERS, compile_one, sanitized

THREADS = 96
CORRECT = {
    "neighbours": lambda i: (i + 40) % THREADS,
    "lanes": lambda i: i ^ 16,
    "shifted by 0": lambda i: i * 0 + 1,
    "load shifted by 0": lambda i: i,
    "warp words": lambda i: i * 0,
    "atomics": lambda i: i * 0 + THREADS,
}
OUTSIDE = {"store behind the end": "1536 bytes", "store before the beginning": "-4 bytes"}
BESIDE_AN_ATOMIC = r"race: shared word \d (is|has) .*atomic operation on it.*, with no barrier between"
# What is planted, and what the emulator says of it.
FAULTS = {
    "missing barrier": r"race: shared word \d+ is|read before anything was written",
    "shuffle as a barrier": r"race: shared word \d+ is|read before anything was written",
    "barrier of half a warp": r"race: shared word \d+ is|read before anything was written",
    "written again": r"race: shared word \d+ is (read|written) and thread \d+ (wrote|read) it, with no barrier between",
    "atomic before the store": rf"{BESIDE_AN_ATOMIC}|read before anything was written",
    "atomic read at once": BESIDE_AN_ATOMIC,
    "atomic stored at once": BESIDE_AN_ATOMIC,
    "atomic after a read": BESIDE_AN_ATOMIC,
    "atomic on nothing": r"thread \d+: shared word 0 is read before anything was written to it",
    "unwritten": "thread 0: shared word 0 is read before anything was written to it",
    "outside shared memory": "thread 95: shared word 96 is outside an array of 96",
    "barrier of some": r"diverge: 46 \(first 50\) have exited; 50 \(first 0\) wait at __syncthreads of planted.cpp:\d+",
    "barrier of two branches": r"diverge: 50 \(first 0\) wait at __syncthreads of .*; 46 \(first 50\) wait at",
    "shuffle of some": r"diverge: 36 \(first 20\) have exited; 60 \(first 0\) wait at __shfl_xor_sync of",
    "shuffle from outside the mask": "__shfl_sync reads lane 20, which the mask leaves out",
    "shuffle without oneself": r"the mask leaves out lane \d+, which takes part",
    "misaligned vectors": "a load of 16 bytes at an address that is no multiple of 16",
}


@pytest.fixture(scope="module")
def planted(programs):
    loaded = ctypes.CDLL(str(compile_one("planted", programs, *LIBRARY)))
    loaded.run_planted.restype = ctypes.c_char_p

    def run(name: str, order: str) -> tuple[str, np.ndarray]:
        out = np.full(4 * THREADS, -1, np.float32)
        said = loaded.run_planted(name.encode(), ORDERS[order], 5, out.ctypes.data_as(ctypes.c_void_p))
        return said.decode(), out

    return run


@pytest.mark.parametrize("order", ORDERS)
class TestEmulator:
    @pytest.mark.parametrize("name", CORRECT)
    def test_correct_kernels_pass(self, planted, name, order):
        said, out = planted(name, order)
        assert said == ""
        np.testing.assert_array_equal(out[:THREADS], CORRECT[name](np.arange(THREADS)))
        assert np.isnan(out[THREADS:]).all(), "what was not written is poison"

    def test_vectors(self, planted, order):
        said, out = planted("vectors", order)
        assert said == ""
        np.testing.assert_array_equal(out, np.arange(4 * THREADS))

    @pytest.mark.parametrize("name", FAULTS)
    def test_faults_are_caught(self, planted, name, order):
        said, _ = planted(name, order)
        assert re.search(FAULTS[name], said), said or "nothing was said"

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_stores_out_of_bounds_are_caught(self, planted, name, order):
        said, _ = planted(name, order)
        assert f"a store {OUTSIDE[name]} from the beginning of `out`, which has 1536" in said


def test_a_load_out_of_bounds_finds_poison(planted):
    said, out = planted("load behind the end", "ascending")
    assert said == ""
    assert np.isnan(out[THREADS - 1])


def test_results_that_depend_on_the_order_differ(planted):
    assert not np.array_equal(planted("first comes", "ascending")[1], planted("first comes", "descending")[1])


@pytest.mark.slow
def test_sanitizers_pass_correct_kernels(programs):
    done = sanitized(compile_one("planted", programs, *SANITIZERS), *CORRECT, "vectors")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["store behind the end", "store before the beginning", "load behind the end"])
def test_sanitizers_catch_what_is_out_of_bounds(programs, name):
    done = sanitized(compile_one("planted", programs, *SANITIZERS), name)
    assert done.returncode not in (0, 3)
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert "planted.cpp" in done.stderr
