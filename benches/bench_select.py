"""Room `select`: `pytest benches/bench_select.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.select import cluster_extremes, nearest_center, top_k

N, D, K = 16_384, 512, 256  # of features and centers
CASES = [
    *(top_k(N=2_500_000, k=k) for k in (100, 10_000)),
    cluster_extremes(N=100_000, K=K),
    *(nearest_center(N=N, D=D, K=K, dtype=dtype) for dtype in ("float32", "bfloat16")),
]
GPU = [
    *(top_k(N=100_000_000, k=k) for k in (100, 10_000)),
    cluster_extremes(N=10_000_000, K=1_000),
    *(nearest_center(N=1_048_576, D=D, K=1_000, dtype=dtype) for dtype in ("float32", "bfloat16")),
]
GROWTH = [
    Sweep(top_k(N=2_500_000, k=1_000), "N", (25_000, 75_000, 250_000, 750_000, 2_500_000)),
    Sweep(nearest_center(N=N, D=D, K=K, dtype="float32"), "N", (150, 500, 1_500, 5_000, 15_000)),
    # From these sizes on, tiles are full.
    Sweep(nearest_center(N=256, D=64, K=K, dtype="float32"), "K", (1_000, 3_000, 10_000, 30_000, 100_000)),
]

test_select = contests(CASES)
test_growth = growths(GROWTH)
