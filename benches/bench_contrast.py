"""Room `contrast`: `pytest benches/bench_contrast.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.contrast import info_nce

D = 256
SHARE = 1 / 20  # of eager's memory beyond results
WHY = "Four fifths of the time are the three products that value and gradients cannot do without."
CASES = [
    info_nce(N=4_096, D=D, dtype="float32", target=2.0, memory_share=SHARE, why=WHY),
    info_nce(N=4_096, D=D, dtype="float32", symmetric=True, memory_share=SHARE),
    info_nce(N=8_192, D=D, dtype="bfloat16", memory_share=SHARE),
]
GPU = [
    info_nce(N=N, D=D, dtype=dtype, symmetric=symmetric)
    for N, dtype in ((32_768, "float32"), (32_768, "bfloat16"), (65_536, "bfloat16"))
    for symmetric in (False, True)
]
GROWTH = [
    # Both sides grow; below, tiles are not full. (Of one direction a tile has whole rows: it grows on, to 15 MiB.)
    Sweep(info_nce(N=1_000, D=64, dtype="float32", symmetric=True), "N", (1_000, 1_500, 2_200, 3_300, 5_000), time=2.0),
    Sweep(info_nce(N=1_024, D=64, dtype="float32"), "D", (20, 64, 200, 640, 2_000)),
]

test_info_nce = contests(CASES)
test_growth = growths(GROWTH)
