"""Room `linear_energy`: `pytest benches/bench_linear_energy.py`."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.linear_energy import linear_score, linear_scores

SHARE = 1 / 20  # of eager's memory beyond results, where rows are many
PRODUCT = "Products alone, as fast as PyTorch forms large square ones, are nine tenths of the time and more: roofline."
UPSTREAM = (
    "Logits that do not fit into 8 MiB are formed a second time: four products in 16 MiB. torch.compile has three and "
    "keeps the logits, rounded to 16 bits; so has ours where the upstream is told (oodkern, foreseen)."
)
CASES = [
    # A pool of a million rows, on a GPU; here its head and some of its rows.
    linear_score(
        N=32_768, D=512, K=1_000, dtype="float32", passes="forward", target=1.5, memory_share=SHARE, why=PRODUCT
    ),
    linear_score(
        N=32_768, D=512, K=1_000, dtype="bfloat16", passes="forward", target=2.8, memory_share=SHARE, why=PRODUCT
    ),
    linear_score(N=8_192, D=2_048, K=1_000, dtype="bfloat16", passes="forward", why=PRODUCT),
    linear_score(N=1_024, D=512, K=21_841, dtype="float32", passes="forward", memory_share=SHARE),
    linear_scores(N=8_192, D=512, K=1_000, dtype="float32"),
    # CIFAR's heads.
    linear_score(N=156_250, D=512, K=10, dtype="float32", passes="forward"),
    linear_score(N=156_250, D=512, K=100, dtype="float32", passes="forward"),
    # Training steps; the last has rows enough for its memory to be compared.
    linear_score(N=512, D=512, K=1_000, dtype="float32", passes="backward"),
    linear_score(N=4_096, D=512, K=1_000, dtype="float32", passes="backward", target=1.2, why=PRODUCT),
    linear_score(
        N=16_384, D=512, K=1_000, dtype="bfloat16", passes="backward", target=1.8, memory_share=SHARE, why=UPSTREAM
    ),
    # Dense prediction.
    linear_score(N=65_536, D=256, K=19, dtype="float32", passes="backward"),
]
GPU = [
    *(
        linear_score(N=N, D=D, K=K, dtype=dtype, passes="forward")
        for N, D, K in (
            (1_000_000, 512, 1_000),
            (1_000_000, 2_048, 1_000),
            (262_144, 512, 21_841),  # eager's logits of a million rows would not fit
        )
        for dtype in ("float32", "bfloat16")
    ),
    linear_scores(N=1_000_000, D=512, K=1_000, dtype="bfloat16"),
    *(linear_score(N=10_000_000, D=512, K=K, dtype="bfloat16", passes="forward") for K in (10, 100)),
    *(
        linear_score(N=N, D=D, K=K, dtype=dtype, passes="backward")
        for N, D, K in ((512, 512, 1_000), (4_096, 512, 1_000), (4_194_304, 256, 19))
        for dtype in ("float32", "bfloat16")
    ),
]
# From these sizes on, what ours holds for each thread is full.
DECADES = (1_000, 3_000, 10_000, 30_000, 100_000)
GROWTH = [
    *(
        # Of 1,000 and 3,000 rows the backward pass has the logits still, 9 MB at most.
        Sweep(linear_score(N=1_000, D=64, K=K, dtype="float32", passes=p), "N", DECADES)
        for p, K in (("forward", 256), ("backward", 700))
    ),
    Sweep(linear_score(N=256, D=64, K=1_000, dtype="float32", passes="forward"), "K", DECADES),
    # Rows enough for tiles to outweigh the sums of the bias's gradient, a number a class and thread.
    Sweep(linear_score(N=1_024, D=64, K=1_000, dtype="float32", passes="backward"), "K", DECADES[:4]),
    Sweep(linear_score(N=1_024, D=64, K=500, dtype="float32", passes="forward"), "D", (64, 200, 640, 2_000, 6_400)),
]

test_linear_energy = contests(CASES)
test_growth = growths(GROWTH)
