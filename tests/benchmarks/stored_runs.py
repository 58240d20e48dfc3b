"""Small runs as `pytest benches --benchmark-only --save` stores them."""

import json

MACHINE = {
    "device": "cpu",
    "cpu": "Abacus",
    "cores": 2,
    "threads": 2,
    "capability": "AVX2",
    "python": "3.12.1",
    "versions": {"torch": "2.10.0", "triton": None},
    "commit": "abc1234",
}
GPU = MACHINE | {"device": "cuda", "gpu": "Loom", "cuda": "13.0", "memory_bytes": 10**10}


def contender(name, milliseconds, spread=0.01, **changes):
    """Of a case of room "energy": quartiles lie `spread` of the median beside it. `file` is the bench file."""
    file = changes.pop("file", "bench_energy.py")
    info = {
        "room": "energy",
        "case": "energy, forward",
        "sizes": {"N": 2000, "K": 10},
        "dtype": "float32",
        "passes": "forward",
        "contender": name,
        "base": "eager",
        "target": None,
        "error": 1.25e-7,
        "peak_bytes": 9_000_000,
        "beyond_bytes": 5_000_000,
        "result_bytes": 4_000_000,
        "flops": 0.0,
        "bytes": 1000,
        "absent": {},
        "least_seconds": 0.001,
        "roofline": 0.5,
    }
    median = milliseconds / 1e3
    stats = {"median": median, "q1": median * (1 - spread), "q3": median * (1 + spread), "rounds": 7}
    return {"fullname": f"benches/{file}::test[{name}]", "extra_info": info | changes, "stats": stats}


def job(name, milliseconds, **more):
    """What is no case."""
    row = contender(name, milliseconds, file="bench_jobs.py")
    return row | {"extra_info": {"room": "jobs", "case": "a job", "contender": name, "peak_bytes": 9_000_000, **more}}


def growth(name, milliseconds, beyond, **changes):
    """Of a sweep over N of 100, 1000 and 10000."""
    info = {
        "axis": "N",
        "fixed": {"K": 10},
        "values": [100, 1000, 10000],
        "median_seconds": [one / 1e3 for one in milliseconds],
        "quartile_seconds": [[0.9e-3 * one, 1.2e-3 * one] for one in milliseconds],
        "peak_bytes": beyond,
        "beyond_bytes": beyond,
        "least_seconds": [1e-5, 1e-4, 1e-3],
        "time_exponent": 1.02,
        "memory_exponent": None if beyond is None else 0.97,
        "promised": {"time": 1.0, "memory": 0.0},
    }
    named = {"room": "energy", "case": "energy, forward", "dtype": "float32", "contender": name, "growth": info}
    return {"fullname": "benches/bench_energy.py::test_growth[...]", "extra_info": named | changes, "stats": {}}


def store(path, benchmarks, machine=MACHINE, datetime="2026-01-02T03:04:05+00:00"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine_info": machine, "datetime": datetime, "benchmarks": benchmarks}))
    return path


README = """# A

<!-- benchmarks: rooms -->
<!-- /benchmarks -->

b

<!-- benchmarks: jobs -->
old
<!-- /benchmarks -->
"""
ROWS = [
    contender("oodkern", 10.0, beyond_bytes=100_000),
    contender("eager", 25.0, beyond_bytes=64_000_000),
    contender("torch.compile", 12.0, beyond_bytes=None),
    growth("oodkern", (0.1, 0.9, 9.0), [100, 200, 300]),
    growth("eager", (0.2, 2.0, 25.0), [10**5, 10**7, 10**8]),
]
PAGE, PLOT = "docs/performance.md", "docs/plots/abacus-energy-energy-forward-against-n-at-k-10-float32.png"


def run_of(root, rows=ROWS, name="abacus/2026-01-02-abc1234.json", **more):
    return store(root / "benches" / "results" / name, rows, **more)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
