"""Room `heads`: `pytest benches/bench_heads.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.heads import HEADS, head

TARGET = 2.0  # times the base's speed, on 2 cores
CASES = [
    *(head(op=op, N=4_096, K=1_000, dtype="float32", target=TARGET) for op in HEADS),
    *(head(op=op, N=512, K=21_841, dtype="bfloat16", target=TARGET) for op in ("oe_head", "bce_head")),
]
GPU = [head(op=op, N=N, K=K, dtype="bfloat16") for op in HEADS for N, K in ((65_536, 1_000), (4_096, 21_841))]
GROWTH = [
    Sweep(head(N=10_000, K=1_000, dtype="float32"), "N", (10, 30, 100, 300, 1_000)),
    Sweep(head(N=64, K=30_000, dtype="float32"), "K", (300, 1_000, 3_000, 10_000, 30_000)),
]

test_heads = contests(CASES)
test_growth = growths(GROWTH)
