"""Room `subspace`: `pytest benches/bench_subspace.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.subspace import alignment, subspace_energy

WHY = (
    "The rival assumes that the basis is orthonormal and knows the upstream: value and gradient of two products. "
    "Ours takes any basis, and an upstream that comes later: two for the value, two for the gradient."
)
CASES = [
    alignment(N=16_384, D=512, K=1_000, dtype="float32", passes="forward"),
    alignment(N=8_192, D=512, K=1_000, dtype="float32", passes="backward"),
    alignment(N=32_768, D=512, K=10, dtype="float32", passes="backward"),
    subspace_energy(N=4_096, D=2_048, r=128, dtype="float32", passes="forward"),
    subspace_energy(N=4_096, D=2_048, r=128, dtype="float32", passes="backward", why=WHY),
    subspace_energy(N=4_096, D=2_048, r=128, dtype="bfloat16", passes="backward", why=WHY),
]
GPU = [
    *(alignment(N=1_048_576, D=512, K=1_000, dtype=d, passes="forward") for d in ("float32", "bfloat16")),
    *(alignment(N=4_096, D=512, K=1_000, dtype=d, passes="backward") for d in ("float32", "bfloat16")),
    alignment(N=1_048_576, D=512, K=10, dtype="bfloat16", passes="backward"),
    subspace_energy(N=1_048_576, D=2_048, r=128, dtype="bfloat16", passes="forward"),
    *(subspace_energy(N=262_144, D=2_048, r=128, dtype=d, passes="backward") for d in ("float32", "bfloat16")),
]
# From these sizes on, what ours holds for each thread is full.
DECADES = (1_000, 3_000, 10_000, 30_000, 100_000)
GROWTH = [
    Sweep(alignment(N=1_000, D=64, K=256, dtype="float32", passes="backward"), "N", DECADES),
    Sweep(alignment(N=256, D=64, K=1_000, dtype="float32", passes="backward"), "K", DECADES),
    Sweep(
        subspace_energy(N=1_000, D=512, r=64, dtype="float32", passes="backward"),
        "N",
        (1_000, 2_000, 5_000, 10_000, 30_000),
    ),
    # Rows are held whole, some of them, in 16 MiB at most.
    Sweep(
        subspace_energy(N=1_024, D=512, r=64, dtype="float32", passes="backward"),
        "D",
        (64, 200, 640, 2_000, 6_400),
        memory=1.0,
    ),
]

test_subspace = contests(CASES)
test_growth = growths(GROWTH)
