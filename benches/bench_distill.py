"""Room `distill`: `pytest benches/bench_distill.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.distill import distillation

N, K = 4_096, 1_000
TARGET = 4.0  # times the base's speed, on 2 cores
CASES = [
    distillation(N=N, K=K, dtype="float32", passes="forward"),
    distillation(N=N, K=K, dtype="float32", passes="backward", target=TARGET),
    distillation(N=N, K=K, dtype="bfloat16", passes="backward", target=TARGET),
]
GPU = [
    distillation(N=65_536, K=K, dtype=dtype, passes=passes)
    for dtype, passes in (("bfloat16", "forward"), ("bfloat16", "backward"), ("float32", "backward"))
]
GROWTH = [
    Sweep(distillation(N=N, K=K, dtype="float32", passes="backward"), "N", (100, 300, 1_000, 3_000, 10_000)),
    Sweep(distillation(N=256, K=K, dtype="float32", passes="backward"), "K", (300, 1_000, 3_000, 10_000, 30_000)),
]

test_distillation = contests(CASES)
test_growth = growths(GROWTH)
