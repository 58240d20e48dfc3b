"""What the page and the blocks of the README say of a run."""

import re

import pytest
from stored_runs import GPU, PAGE, PLOT, README, change, contender, job, run_of

from benches.report import BLOCK, main
from benches.report_tables import MAKERS, megabytes, significant


@pytest.fixture
def page(tmp_path):
    """The page of some rows; without growth, whose plots take time."""

    def make(rows, **more):
        run_of(tmp_path, rows, **more)
        assert main([], tmp_path) == 0
        return (tmp_path / PAGE).read_text()

    return make


def section(text, title):
    return re.search(rf"### {title}\n\n(.*?)(?=\n\n###|\Z)", text, re.DOTALL)[1]


def test_the_table_of_a_room(written):
    text = (written / PAGE).read_text()
    room = section(text, "energy")
    assert (
        "| energy, forward | N=2,000 × K=10 | float32 | 10.0 [9.90, 10.1] | 0.1 | 1.2e-07 | 50 % | 2.50 / 64 | 1.20 |"
        in room
    )
    assert "| eager (base) | 25.0 | [24.8, 25.2] | 7 | 9.0 | 64 | 1.2e-07 | 1.00 |" in room
    tables = re.findall(r"(?:\|.*\n)+\n(.*)", text)
    assert len(tables) == 3
    assert all(re.fullmatch(r"`pytest benches/bench_energy.py --benchmark-only( -k growth)?`", line) for line in tables)
    assert "| N | 100 to 10,000 | K=10 | float32 | oodkern | 1.02 | 0.97 | 1, 0 |" in section(text, "Growth")
    assert f"]({PLOT.removeprefix('docs/')})" in text
    assert "Abacus, 2 cores, 2 threads, AVX2; Python 3.12.1, torch 2.10.0; commit abc1234, 2026-01-02" in text


def test_blocks_of_the_readme(written):
    text = (written / "README.md").read_text()
    blocks = {match[2]: match[3] for match in BLOCK.finditer(text)}
    assert blocks["jobs"] == "No run in benches/results has these.\n"
    line = (
        "| energy | energy, forward | N=2,000 × K=10 | float32 | 10.0 | 2.50 | 1.20 | 1.20 (torch.compile) | 0.1 / 64 |"
    )
    assert line in blocks["rooms"]
    assert BLOCK.sub("", text) == BLOCK.sub("", README), "what is around the blocks stays"


def test_every_block_has_its_cases(tmp_path):
    root = tmp_path
    (root / "README.md").write_text("".join(f"<!-- benchmarks: {name} -->\n<!-- /benchmarks -->\n" for name in MAKERS))
    small, large = {"case": "small", "bytes": 10}, {"case": "large", "bytes": 20}
    method = {"room": "methods", "case": "single-label", "base": "oe", "file": "bench_step.py"}
    recipe = {"room": "greg", "case": "GReg+", "base": "recipe", "file": "bench_greg_step.py"}
    scores = {"room": "pool", "case": "three scores", "base": "product", "file": "bench_pool.py"}
    run_of(
        root,
        [
            *(contender("oodkern", 1.0, **size) for size in (small, large, {**small, "dtype": "bfloat16"})),
            *(contender("oodkern", 1.0, room="norm", flops=flops, case=f"{flops:g} flops") for flops in (2.0, 1.0)),
            contender("oodkern", 1.0, room="norm", flops=2.0, case="as many"),
            contender("oe", 20.0, **method),
            contender("greg", 50.0, beyond_bytes=10_000_000, **method),
            contender("oodkern", 20.0, **recipe),
            contender("recipe", 90.0, **recipe),
            contender("oodkern", 20.0, **scores),
            contender("product", 16.0, **scores),
            *(
                job(name, 1500.0, to_table_seconds=1.25, installed_bytes=7_000_000)
                for name in ("oodkern", "import torch")
            ),
        ],
    )
    assert main([], root) == 0
    blocks = {match[2]: match[3].splitlines() for match in BLOCK.finditer((root / "README.md").read_text())}
    rooms = [line.split(" | ")[:2] + line.split(" | ")[3:4] for line in blocks["rooms"] if "N=" in line]
    assert rooms == [
        ["| energy", "large", "float32"],
        ["| energy", "small", "bfloat16"],
        ["| norm", "2 flops", "float32"],
    ]
    assert "| greg | single-label | 50.0 [49.5, 50.5] | 2.50 | 10 | 2.00 |" in blocks["methods"]
    (line,) = (line for line in blocks["greg"] if line.startswith("| GReg+"))
    assert line.endswith("| 20.0 [19.8, 20.2] | 5.0 | 4.50 / 5.0 |")
    (line,) = (line for line in blocks["pool"] if line.startswith("| three scores"))
    assert line.endswith("| 20.0 [19.8, 20.2] | 5.0 | 0.80 / 5.0 |")
    assert "| a job | import torch | 1.50 [1.48, 1.52] | 9.0 | to table 1.25 s, installed 7.0 MB |" in blocks["jobs"]
    jobs = section((root / PAGE).read_text(), "jobs")
    assert blocks["jobs"][2:] == jobs.splitlines(), "what is no case has no table of ours beside rivals"
    assert blocks["greg"][-1] == "`pytest benches/bench_greg_step.py --benchmark-only`"


def test_what_speaks_against_us(page):
    """And nothing that lies on the other side of a limit."""
    text = page(
        [
            contender("oodkern", 10.0, target=2.5, beyond_bytes=3_000_000),
            contender("oodkern, foreseen", 5.0),
            contender("eager", 25.0, beyond_bytes=2_000_001),
            contender("chunked", 8.0, beyond_bytes=1_999_999),
            contender("torch.compile", 9.8, 0.0105),
            job("oodkern", 10.0),
            job("import torch", 1.0),
            contender("oodkern", 10.0, room="norm", target=2.6, absent={"liger": "No module named 'liger'"}),
            contender("eager", 25.0, room="norm", absent={"liger": "No module named 'liger'"}),
            contender("oodkern", 10.0, room="heads", absent={"liger": "No module named 'liger'"}),
        ]
    )
    case = "energy, forward, N=2,000 × K=10, float32"
    took = "10.0 [9.90, 10.1]"
    assert section(text, "Where a rival is faster").splitlines() == [
        f"- energy: {case}: chunked is 1.25 times as fast (8.00 ms [7.92, 8.08] against {took})",
        f"- energy: {case}: torch.compile is 1.02 times as fast (9.80 ms [9.70, 9.90] against {took}; the"
        " quartiles meet)",
    ]
    assert section(text, "Where a rival holds less memory") == f"- energy: {case}: chunked holds 2.0 MB against 3.0"
    assert section(text, "Targets missed") == f"- norm: {case}: aimed for 2.6 times as fast as eager, reached 2.50"
    assert section(text, "Who is absent") == "- liger: No module named 'liger' (norm, heads)"


def test_nothing_speaks_against_us(page):
    text = page([contender("oodkern", 10.0, target=2.5), contender("eager", 25.0)])
    assert section(text, "Where a rival is faster") == "Nowhere in this run."
    assert section(text, "Where a rival holds less memory") == "Nowhere, by more than 1 MB."
    assert section(text, "Targets missed") == "None."
    assert section(text, "Who is absent") == "Nobody."


def test_the_newest_run_of_each_machine(tmp_path, page):
    run_of(tmp_path, [contender("oodkern", 1.0)], "abacus/2026-01-09-fff.json", datetime="2026-01-09T01:00:00+00:00")
    run_of(tmp_path, [contender("oodkern", 2.0)], "abacus/2026-01-09-aaa.json", datetime="2026-01-09T02:00:00+00:00")
    run_of(tmp_path, [contender("oodkern", 3.0)], "abacus/2026-01-08-zzz.json", datetime="2026-01-10T00:00:00+00:00")
    suite = {"failed": {"norm: x": "out of memory"}, "broken": {}, "left_out": ["heads: y"]}
    path = run_of(tmp_path, [contender("oodkern", 4.0)], "loom/2026-01-01-abc.json", machine=GPU)
    change(path, '"benchmarks"', f'"suite": {str(suite).replace(chr(39), chr(34))}, "benchmarks"')
    assert main([], tmp_path) == 0
    abacus, loom = re.split(r"^## Loom$", (tmp_path / PAGE).read_text(), flags=re.MULTILINE)
    assert "## Abacus, 2 cores" in abacus
    assert "benches/results/abacus/2026-01-09-aaa.json" in abacus
    assert "| 2.00 [1.98, 2.02] |" in abacus
    assert "| 4.00 [3.96, 4.04] |" in loom
    assert "Loom, 10 GB, CUDA 13.0; Abacus" in loom
    assert "`python benches/gpu_suite.py --out DIR --rooms energy`" in loom
    assert (
        section(loom, "Failed, wrong or left out") == "- failed: norm: x: out of memory\n- no time left for: heads: y"
    )


def test_numbers():
    assert [significant(x) for x in (0.01234, 0.1, 1.234, 9.999)] == ["0.0123", "0.10", "1.23", "10.0"]
    assert [significant(x) for x in (99.99, 1234.5)] == ["100", "1,234"]
    assert [megabytes(x) for x in (None, 0, 60_000, 9_940_000, 9_960_000)] == ["", "0.0", "0.1", "9.9", "10"]
