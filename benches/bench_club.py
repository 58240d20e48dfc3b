"""CLUB: `pytest benches/bench_club.py`. At 128 rows, a batch of OAL, what is published is beside it."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.club import club

N, D = 1_024, 512
COLD = "8 MB are read and written: 0.9 to 1.1 ms after itself, 1.5 after another one."
CASES = [
    club(N=128, D=D, dtype="float32"),
    club(N=N, D=D, dtype="float32", target=2.0, why=COLD),
    club(N=N, D=D, dtype="bfloat16"),
]
GPU = [club(N=rows, D=D, dtype=dtype) for rows in (N, 65_536) for dtype in ("float32", "bfloat16")]
GROWTH = [
    Sweep(club(N=N, D=D, dtype="float32"), "N", (100, 300, 1_000, 3_000, 10_000)),
    Sweep(club(N=N, D=D, dtype="float32"), "D", (50, 150, 500, 1_500, 5_000)),
]

test_club = contests(CASES)
test_growth = growths(GROWTH)
