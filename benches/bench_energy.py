"""Room `energy`: `pytest benches/bench_energy.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.energy import score

N, K = 16_384, 1_000
# Times the base's speed that was aimed for, on 2 cores.
TARGETS = {
    ("energy", "forward", "float32"): 3.5,
    ("energy", "forward", "bfloat16"): 6.0,
}
WHYS = {
    ("energy", "forward", "bfloat16"): (
        "6 times would be 0.2 ns an element and core; in cache, without waiting for memory, the maximum and the "
        "exponential take 0.25. Reading a block once, with its first element for a pivot, is a fifth faster and up to "
        "twice as wrong."
    ),
    ("joint_energy", "backward", "float32"): (
        "Two thirds of the time are the first touch of 65 MB of results, which all pay: rows in cache take the rest."
    ),
}
CASES = [
    score(
        op=op,
        N=N,
        K=K,
        dtype=dtype,
        passes=passes,
        target=TARGETS.get((op, passes, dtype), 2.5),
        why=WHYS.get((op, passes, dtype), ""),
    )
    for op in ("energy", "joint_energy")
    for passes in ("forward", "backward")
    for dtype in ("float32", "bfloat16")
    if (op, dtype) != ("joint_energy", "bfloat16")
]
GPU = [
    score(op=op, N=1_048_576, K=1_000, dtype="bfloat16", passes=passes)
    for op in ("energy", "joint_energy")
    for passes in ("forward", "backward")
]
GROWTH = [
    # Of results of up to 32 MiB: see bench_norm.py.
    Sweep(score(N=N, K=K, dtype="float32", passes="backward"), "N", (80, 250, 800, 2_500, 8_000)),
    Sweep(score(N=256, K=K, dtype="float32", passes="backward"), "K", (300, 1_000, 3_000, 10_000, 30_000)),
]

test_energy = contests(CASES)
test_growth = growths(GROWTH)
