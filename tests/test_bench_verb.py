"""`oodkern bench`: its table, its JSON, what it says of rivals that are faster or absent, and its mistakes."""

import dataclasses
import functools
import json
import re

import pytest
import torch
from benchmarks.planted import scores

from oodkern.benchmarks import short
from oodkern.benchmarks.case import COMPILED, OURS, Contender
from oodkern.benchmarks.machine import Ceilings
from oodkern.benchmarks.measure import Found, Outcome
from oodkern.benchmarks.memory import Peak
from oodkern.benchmarks.rooms.energy import eager_energy
from oodkern.benchmarks.table import outcomes_text, place
from oodkern.benchmarks.timing import Times
from oodkern.cli import main

CPU = torch.device("cpu")
MACHINE = {
    **{"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 1, "capability": "AVX2", "python": "3.11"},
    **{"versions": {"torch": "2.13", "triton": None}, "commit": None, "oodkern": "0.1"},
}


def tiny(device):
    """The cases as they are, but small, and nothing compiled."""
    cases = []
    for case in REAL(device):
        case = case.at(**{name: min(size, 40) for name, size in case.sizes.items()})
        kept = {name: one for name, one in case.contenders.items() if not one.compiled}
        cases.append(dataclasses.replace(case, contenders=kept))
    return cases


REAL = short.short_cases


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(short, "short_cases", tiny)
    monkeypatch.setattr(short, "measure", functools.partial(short.measure, fewest=1))
    monkeypatch.setattr(short, "ceilings", lambda device: Ceilings(1e9, dict.fromkeys(("float32", "bfloat16"), 1e10)))


def test_a_line_a_case(small, capsys):
    assert main(["bench", "--device", "cpu", "--seconds", "0.1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    cases = tiny(CPU)
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(cases)]] == [
        place(case).split(", N=")[0] for case in cases
    ]
    assert re.fullmatch(
        r"energy, forward +N=40 K=40 +float32 +[\d.]+ \[[\d.]+, [\d.]+\] +[\d.]+ +- +[\d.]+ +[\d.]+ +"
        r"[\d.]+ / [\d.]+ +\de-\d\d / \de-\d\d",
        lines[2],
    )
    assert f"torch {torch.__version__}" in lines[-1]
    progress = printed.err.splitlines()
    assert len(progress) == len(cases)
    assert re.fullmatch(r"1 of \d: energy, forward, N=40 x K=40, float32, [\d.]+ s", progress[0])


def test_json_has_every_contender(small, capsys, monkeypatch):
    monkeypatch.setattr(short, "short_cases", lambda device: tiny(device)[:2])
    assert main(["bench", "--device", "cpu", "--json", "--seconds", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == "oodkern bench --device cpu --json --seconds 0.1"
    assert found["machine"]["device"] == "cpu"
    assert [(row["room"], row["case"], row["contender"]) for row in found["rows"]] == [
        (case.room, case.title, name)
        for case in tiny(CPU)[:2]
        for name, one in case.contenders.items()
        if one.missing(CPU) is None
    ]
    for row in found["rows"]:
        low, high = row["quartile_seconds"]
        assert 0 < low <= row["median_seconds"] <= high
        assert row["error"] < 1e-3
        assert (row["peak_bytes"] is not None) == (row["contender"] in (OURS, row["base"]))


def outcome(times, absent=(), errors=(1e-7, 2e-7)):
    one = scores(N=1_000, dtype="float32")
    found = {
        name: Found(Times(seconds), Peak(3_000_000 + 10**6 * i, 10**6), errors[min(i, 1)])
        for i, (name, seconds) in enumerate(times.items())
    }
    contenders = {name: Contender(eager_energy) for name in [*times, *absent]}
    return Outcome(dataclasses.replace(one, contenders=contenders), found, dict(absent))


def test_what_the_text_says():
    """Of made times: ratios of medians, rivals that are faster with and without doubt, who else there was."""
    times = {OURS: (0.002, 0.002, 0.004), "oodkern, foreseen": (0.001,), "eager": (0.005,), "theirs": (0.003,)}
    text = outcomes_text([outcome(times, {"liger": "has no CPU kernels", COMPILED: "No compiler"})], MACHINE)
    row = next(line for line in text.splitlines() if line.startswith("planted: scores, backward"))
    assert row.split("float32")[1].split() == [
        "2",
        "[2,",
        "3]",
        "2.50",
        *"---",
        "2.0",
        "/",
        "4.0",
        "1e-07",
        "/",
        "2e-07",
    ]
    assert "No rival was faster in these cases." in text
    assert "N=1,000 x D=8 x K=5, float32: oodkern, foreseen 0.50, theirs 1.50" in text
    assert "liger, in 1 of 1: has no CPU kernels" in text
    assert "torch.compile, in 1 of 1: No compiler" in text
    assert (
        "Some CPU, 2 cores, 1 thread(s), AVX2\nPython 3.11, torch 2.13; oodkern 0.1, commit not of a checkout" in text
    )
    faster = outcome({OURS: (0.002, 0.003, 0.004), "eager": (0.001,), COMPILED: (0.0029,)})
    text = outcomes_text([faster], {**MACHINE, "device": "cuda", "gpu": "Some GPU", "cuda": "13.0", "commit": "abc"})
    assert "float32: eager takes 0.33 of our time\n" in text
    assert "float32: torch.compile takes 0.97 of our time, though quartiles overlap\n" in text
    assert "No rival was faster" not in text
    assert "Some GPU, CUDA 13.0; Some CPU" in text
    assert text.endswith("commit abc")


def test_a_base_that_is_absent():
    """On a GPU eager may want more memory than there is."""
    text = outcomes_text([outcome({OURS: (0.002,), COMPILED: (0.004,)}, {"eager": "OutOfMemoryError: 80 GB"})], MACHINE)
    row = next(line for line in text.splitlines() if line.startswith("planted: scores, backward"))
    assert " ".join(row.split("float32")[1].split()) == "2 [2, 2] - 2.00 - - 2.0 / - 1e-07 / -"
    assert "eager, in 1 of 1: OutOfMemoryError: 80 GB" in text


def test_without_a_compiler_the_rest_goes_on(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    log: list[str] = []
    case = REAL(CPU)[0].at(N=30, K=7)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):  # setting it and deleting it again would leave none
        (found,) = short.measure_short([case], CPU, 0.1, log.append)
    assert list(found.found) == [name for name in case.contenders if name != COMPILED]
    assert "no-such-compiler" in found.absent[COMPILED]
    assert len(log) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "oodkern bench: --seconds: expected a number from 0.1 to 60, got 0"),
        (["--seconds", "nan"], "oodkern bench: --seconds: expected a number from 0.1 to 60, got nan"),
        (["--device", "gpu"], "oodkern bench: device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_mistakes_are_2_and_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err == message + "\n"
    assert printed.out == ""
