"""Room `losses`, features and head to loss and gradients: `pytest benches/bench_losses.py`."""

from runner import contests

from oodkern.benchmarks.rooms.losses import loss_step

D = 512
WHY = (
    "Four fifths of the time are the products and what is done to their tiles; the rest are PyTorch's calls "
    "around them, of which one cross-entropy has fewer."
)
LONG = (
    "torch.compile keeps the logits, rounded to 16 bits, 23 MB; ours forms slopes slice by slice, writes them where "
    "the weight's gradient will be and reads them again."
)
CASES = [
    loss_step(loss="cross_entropy", N=512, M=0, D=D, K=1_000, dtype="float32", why=WHY),
    loss_step(loss="cross_entropy", N=128, M=0, D=D, K=21_841, dtype="float32"),
    loss_step(loss="energy", N=512, M=512, D=D, K=1_000, dtype="float32", why=WHY),
    loss_step(loss="energy", N=256, M=256, D=D, K=21_841, dtype="bfloat16", why=LONG),
    loss_step(loss="outlier_exposure", N=128, M=128, D=D, K=21_841, dtype="float32"),
]
GPU = [
    loss_step(loss=loss, N=N, M=0 if loss == "cross_entropy" else N, D=D, K=K, dtype=dtype)
    for loss in ("cross_entropy", "energy", "outlier_exposure")
    for N, K, dtype in (
        (512, 1_000, "bfloat16"),
        (512, 21_841, "bfloat16"),
        (4_096, 21_841, "float32"),
        (4_096, 21_841, "bfloat16"),
    )
]

test_losses = contests(CASES)
