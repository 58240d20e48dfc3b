"""The pairwise hinge: `pytest benches/bench_pairwise_hinge.py`. 64 and 128 scores are a batch of EDGE."""

from runner import contests, growths

from oodkern.benchmarks.growth import Sweep
from oodkern.benchmarks.rooms.pairwise_hinge import pairwise_hinge

WHY = (
    "What is left is autograd's: of a Function that computes nothing value and gradients take 28 us, our kernel "
    "9. Who is told the upstream forms gradients without autograd."
)
CASES = [pairwise_hinge(N=64, M=128, why=WHY), pairwise_hinge(N=4_096, M=100_000, target=2.0)]
GPU = CASES
GROWTH = [Sweep(pairwise_hinge(N=4_096, M=1_000_000), "M", (10_000, 30_000, 100_000, 300_000, 1_000_000), memory=1.0)]

test_pairwise_hinge = contests(CASES)
test_growth = growths(GROWTH)
