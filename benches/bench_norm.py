"""Room `norm`: `pytest benches/bench_norm.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.norm import sample_norm

D = 3 * 224 * 224
ALL_PASSES = "double backward"
TARGET = 3.0  # times the base's speed, on 2 cores
CASES = [
    sample_norm(N=64, D=D, dtype="bfloat16", passes="forward"),
    sample_norm(N=16, D=D, dtype="float32", passes=ALL_PASSES, target=TARGET),
    sample_norm(N=64, D=D, dtype="float32", passes=ALL_PASSES, target=TARGET),
    sample_norm(N=64, D=D, dtype="bfloat16", passes=ALL_PASSES),
]
GPU = [
    sample_norm(N=256, D=D, dtype="bfloat16", passes="forward"),
    *(sample_norm(N=256, D=D, dtype=dtype, passes=ALL_PASSES) for dtype in ("float32", "bfloat16")),
]
# The first gradient and a cotangent of the size of x are there until the second one is.
GROWTH = [
    # A result beyond 32 MiB is of fresh pages each time, whose cost is what the system makes it.
    Sweep(sample_norm(N=64, D=D // 49, dtype="float32", passes="backward"), "N", (26, 80, 260, 800, 2_600)),
    Sweep(
        sample_norm(N=16, D=D, dtype="float32", passes=ALL_PASSES), "D", (1_500, 5_000, 15_000, 50_000, D), memory=1.0
    ),
]

test_norm = contests(CASES)
test_growth = growths(GROWTH)
