"""Pools of features, scored from a memory map: `pytest benches/bench_pool.py`.

Scoring is compared with the product alone, of the same chunks, widened into a reused buffer, into a reused matrix; and
with what users write: chunk by chunk the product, logsumexp, softplus and softmax.
"""

import functools
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from runner import CLOCK, contests, replay

import oodkern
from oodkern import _native, reference
from oodkern.benchmarks.case import OURS, Case, Contender, case
from oodkern.benchmarks.timing import Times
from oodkern.ops.linear_energy import LinearScores
from oodkern.pools import CHUNK_ROWS, FeatureStore, score_pool

FOLDER = Path(tempfile.gettempdir()) / f"oodkern-pools-{os.getpid()}"  # the files of this run, its children's too
D = 128
# Rows by classes: of a thousand, eager PyTorch takes eight seconds a million.
ROWS = {100: 500_000, 1_000: 50_000}
SAMPLE = 2_000  # rows whose scores are compared with float64
BLOCK = 100_000
BARE = "bare product"
EAGER_TARGET = 1.3
ANONYMOUS_LIMIT = 64e6  # bytes; the pool has 256e6


@pytest.fixture(scope="module", autouse=True)
def folder():
    yield
    shutil.rmtree(FOLDER, ignore_errors=True)


def file_of(folder, name, N, D, block_of, generator):
    """A float16 file of the blocks; its pages are in memory when it was just written. Made once for all processes."""
    path = Path(folder) / f"{name}-{N}-{D}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        features = np.lib.format.open_memmap(part, "w+", np.float16, (N, D))
        for start in range(0, N, BLOCK):
            features[start : start + BLOCK] = block_of(min(BLOCK, N - start), generator).half().numpy()
        features.flush()
        part.rename(path)
    return path


def noise(D, rows, generator):
    return torch.randn(rows, D, generator=generator)


def pool(folder, N, D, K, generator):
    """A file and a head, which are the same whether the file was there or not."""
    head = torch.randn(K, D, generator=generator) * 0.1, torch.randn(K, generator=generator)
    return FeatureStore.open(file_of(folder, "noise", N, D, functools.partial(noise, D), generator)), *head


def ours(store, weight, bias):
    return {name: torch.from_numpy(found) for name, found in score_pool(store, (weight, bias)).items()}


@torch.no_grad()
def bare_product(store, weight, bias):
    wide = torch.empty(CHUNK_ROWS, store.dimension)
    logits = torch.empty(CHUNK_ROWS, len(weight))
    for _, chunk in store.chunks():
        rows = len(chunk)
        wide[:rows].copy_(chunk)
        torch.addmm(bias, wide[:rows], weight.T, out=logits[:rows])


@torch.no_grad()
def eager(store, weight, bias):
    found = {name: torch.empty(len(store)) for name in ("energy", "joint_energy", "msp")}
    for start, chunk in store.chunks():
        logits = torch.nn.functional.linear(chunk.float(), weight, bias)
        rows = slice(start, start + len(chunk))
        found["energy"][rows] = -torch.logsumexp(logits, 1)
        found["joint_energy"][rows] = torch.nn.functional.softplus(logits).sum(1)
        found["msp"][rows] = torch.softmax(logits, 1).amax(1)
    return found


def worst_of_sample(result, inputs):
    """Relative, of rows drawn at random; the bare product has no scores."""
    if result is None:
        return None
    store, weight, bias = inputs
    chosen = torch.randint(len(store), (SAMPLE,), generator=torch.Generator().manual_seed(1)).sort().values
    rows = store.rows(chosen).double()
    exact = LinearScores(*reference.linear_scores(rows, weight.double(), bias.double()))._asdict()
    return max(float(((found[chosen] - exact[name]) / exact[name]).abs().max()) for name, found in result.items())


@case
def scoring(*, folder: str, N: int, D: int, K: int) -> Case:
    return Case(
        room="pool",
        title=f"three scores of a pool in a file, K={K:,}",
        sizes={"N": N, "D": D, "K": K},
        dtype="float16",
        passes="whole",
        inputs=functools.partial(pool, folder, N, D, K),
        contenders={OURS: Contender(ours), BARE: Contender(bare_product), "eager": Contender(eager)},
        error=worst_of_sample,
        slack=1e-5,
        target=EAGER_TARGET,
    )


def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def anonymous_growth(case):
    """In a process of its own: how much its own memory grows by at most while all is scored, and the seconds."""
    (store, weight, bias), _ = case.data(torch.device("cpu"))
    seen, over = [anonymous_bytes()], threading.Event()

    def watch():
        while not over.wait(0.01):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    try:
        score_pool(store, (weight, bias))
        took = time.perf_counter() - started
    finally:
        over.set()
        thread.join()
    return max(seen) - seen[0], took


SCORING = [scoring(folder=str(FOLDER), N=N, D=D, K=K) for K, N in ROWS.items()]
test_scoring = contests(SCORING)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.benchmark(timer=CLOCK)
def test_anonymous_memory(benchmark, request):
    """The pool is never in memory that is the process's own, whatever of the file's pages the system keeps."""
    if request.config.getoption("--smoke"):
        pytest.skip("--smoke: the pool has to be large")
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        grown, took = other.submit(anonymous_growth, SCORING[0]).result()
    benchmark.group = "pool: RssAnon while a pool is scored"
    benchmark.extra_info.update(
        room="pool",
        case="RssAnon while a pool is scored",
        contender=OURS,
        sizes=dict(SCORING[0].sizes),
        peak_bytes=grown,
    )
    replay(benchmark, Times((took,)))
    assert grown < ANONYMOUS_LIMIT


@pytest.mark.gpu
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.skipif(not torch.cuda.is_available() or bool(_native.missing["cuda"]), reason="no CUDA kernels here")
def test_scoring_from_host_memory(benchmark):
    """10 million rows of 512 in bfloat16 at 80 % of the rate of copies from pinned memory, or of the kernel's own."""
    N, D, rows = 10_000_000, 512, CHUNK_ROWS
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    if free < 3 * N * D:
        pytest.skip("needs 15 GB of memory")
    features = torch.empty(N, D, dtype=torch.bfloat16)
    block = torch.randn(100_000, D).bfloat16()
    for part in features.split(len(block)):
        part.copy_(block)
    weight, bias = (torch.randn(100, D) * 0.1).bfloat16().cuda(), torch.randn(100).bfloat16().cuda()

    def rate(work, count):
        work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            work()
        torch.cuda.synchronize()
        return count * rows / (time.perf_counter() - started)

    pinned = torch.empty(rows, D, dtype=torch.bfloat16, pin_memory=True)
    there = torch.randn(rows, D, device="cuda").bfloat16()
    bus = rate(lambda: there.copy_(pinned, non_blocking=True), 50)
    there.normal_()
    kernel = rate(lambda: oodkern.linear_scores(there, weight, bias), 50)
    score_pool(features[: 4 * rows], (weight, bias))
    started = time.perf_counter()
    energy = score_pool(features, (weight, bias))["energy"]
    took = time.perf_counter() - started
    ours = N / took
    benchmark.group = "pool: three scores of a pool in host memory"
    benchmark.extra_info.update(
        room="pool",
        case="three scores of a pool in host memory",
        contender=OURS,
        sizes={"N": N, "D": D, "K": 100},
        dtype="bfloat16",
        rows_per_second={OURS: ours, "copies": bus, "the kernel": kernel},
    )
    replay(benchmark, Times((took,)))
    exact = reference.linear_energy(block.double(), weight.cpu().double(), bias.cpu().double())
    for last in (0, N - len(block)):
        torch.testing.assert_close(
            torch.from_numpy(energy[last : last + len(block)]).double(), exact, rtol=3e-5, atol=3e-5
        )
    assert ours >= 0.8 * min(bus, kernel)
