"""Room `distill`: `pytest benches/bench_distill.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.distill import distillation

N, K = 4_096, 1_000
TARGET = 4.0  # times the base's speed, on 2 cores
WHY = (
    "Arithmetic is what it waits for, not memory: 0.8 ns an element and core for the value and 0.6 to 0.7 for the "
    "gradient, of rows in cache too; the energy, one exponential an element, takes 0.25, and here are two a pass "
    "beside a term that does not cancel."
)
CASES = [
    distillation(N=N, K=K, dtype="float32", passes="forward"),
    distillation(N=N, K=K, dtype="float32", passes="backward", target=TARGET, why=WHY),
    distillation(N=N, K=K, dtype="bfloat16", passes="backward", target=TARGET, why=WHY),
]
GPU = [
    distillation(N=65_536, K=K, dtype=dtype, passes=passes)
    for dtype, passes in (("bfloat16", "forward"), ("bfloat16", "backward"), ("float32", "backward"))
]
GROWTH = [
    # Of results of up to 32 MiB: see bench_norm.py.
    Sweep(distillation(N=N, K=K, dtype="float32", passes="backward"), "N", (80, 250, 800, 2_500, 8_000)),
    Sweep(distillation(N=256, K=K, dtype="float32", passes="backward"), "K", (300, 1_000, 3_000, 10_000, 30_000)),
]

test_distillation = contests(CASES)
test_growth = growths(GROWTH)
