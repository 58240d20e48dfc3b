"""What `import oodkern` adds to `import torch`: `pytest benches/bench_import.py`."""

import statistics
import subprocess
import sys

LIMIT_SECONDS = 0.3
PROGRAM = """
import sys, time, torch, numpy
started = time.perf_counter()
import oodkern
print(time.perf_counter() - started)
"""


def test_import(benchmark):
    def once():
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        return float(done.stdout)

    once()  # byte code is compiled on the first
    added = [once() for _ in range(5)]
    benchmark.extra_info["added_seconds"] = statistics.median(added)
    benchmark.pedantic(once, rounds=1)
    print(f"\nimport oodkern adds {statistics.median(added):.3f} s to import torch (limit {LIMIT_SECONDS})")
    assert statistics.median(added) < LIMIT_SECONDS
