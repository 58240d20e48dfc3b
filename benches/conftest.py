import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benches")]

from runner import EXPONENT_SLACK, check_error, check_memory, replay, smoke, without_compiled  # noqa: E402
from stored import new_path  # noqa: E402

from oodkern.benchmarks.case import OURS  # noqa: E402
from oodkern.benchmarks.growth import measure_growth  # noqa: E402
from oodkern.benchmarks.machine import ceilings, machine, machine_name  # noqa: E402
from oodkern.benchmarks.measure import as_row, measure  # noqa: E402
from oodkern.benchmarks.table import outcome_lines  # noqa: E402

OUTCOMES = {}
GROWTHS = {}


def pytest_addoption(parser):
    group = parser.getgroup("oodkern")
    group.addoption(
        "--seconds",
        type=float,
        default=0.5,
        help="that the turns of a case take together, five turns at least (default 0.5)",
    )
    group.addoption("--bench-device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--save", action="store_true", help="keep the run in benches/results/MACHINE/DATE-COMMIT.json")
    group.addoption(
        "--smoke", action="store_true", help="tiny sizes, one turn, no torch.compile, no memory: do all run?"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.machine = machine(torch.device(config.getoption("--bench-device")))
    if config.getoption("--save") and not config.option.benchmark_json:
        folder = ROOT / "benches" / "results" / machine_name(config.machine)
        folder.mkdir(parents=True, exist_ok=True)
        config.saved = new_path(folder, config.machine["commit"])
        config.option.benchmark_json = str(config.saved.with_suffix(".part"))


def pytest_unconfigure(config):
    if saved := getattr(config, "saved", None):
        part = saved.with_suffix(".part")
        if part.exists() and part.stat().st_size:
            part.replace(saved)
        else:
            part.unlink(missing_ok=True)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(config.machine)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Parameters and options are objects and their addresses; what they say is in extra_info."""
    for row in output_json["benchmarks"]:
        for key in ("params", "param", "options"):
            row.pop(key, None)


def pytest_benchmark_update_commit_info(config, commit_info):
    """The project and the branch are nobody's business, and the commit is the machine's."""
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--bench-device"))


@pytest.fixture(scope="session")
def contest(request, device):
    """Hands the row of a contender to pytest-benchmark; measures the case where it was not yet."""
    tiny, seconds = request.config.getoption("--smoke"), request.config.getoption("--seconds")

    def hand(benchmark, case, name):
        if case.name not in OUTCOMES:
            if tiny:
                OUTCOMES[case.name] = measure(without_compiled(smoke(case)), device, 0, fewest=1, memory=False)
            else:
                OUTCOMES[case.name] = measure(case, device, seconds)
        outcome = OUTCOMES[case.name]
        if name in outcome.absent:
            pytest.skip(f"{name}: {outcome.absent[name]}")
        if tiny and case.contenders[name].compiled:
            pytest.skip(f"{name}: --smoke")
        benchmark.group = case.name
        benchmark.extra_info.update(as_row(outcome, name, None if tiny else ceilings(device)))
        replay(benchmark, outcome.found[name].times)
        if name == OURS:
            check_error({name: found.error for name, found in outcome.found.items()}, case.base, case.slack)
            check_memory({name: found.peak for name, found in outcome.found.items()}, case.base, case.memory_share)

    return hand


@pytest.fixture(scope="session")
def growth(request, device):
    """Hands the row of a contender of a sweep to pytest-benchmark."""
    tiny = request.config.getoption("--smoke")

    def hand(benchmark, sweep, name):
        if tiny:
            pytest.skip("--smoke: cases are what runs")
        if sweep.name not in GROWTHS:
            GROWTHS[sweep.name] = measure_growth(sweep, device)
        if name not in GROWTHS[sweep.name]:
            pytest.skip(f"{name}: not enough memory for the largest {sweep.axis}")
        found = GROWTHS[sweep.name][name]
        benchmark.group = f"growth, {sweep.name}"
        fixed = {key: size for key, size in sweep.case.sizes.items() if key != sweep.axis}
        benchmark.extra_info.update(
            room=sweep.case.room,
            case=sweep.case.title,
            dtype=sweep.case.dtype,
            contender=name,
            growth={
                "axis": sweep.axis,
                "fixed": fixed,
                "values": list(found.values),
                "median_seconds": [times.median for times in found.times],
                "quartile_seconds": [list(times.quartiles) for times in found.times],
                "peak_bytes": found.peaks and [peak.bytes for peak in found.peaks],
                "beyond_bytes": found.peaks and [peak.beyond for peak in found.peaks],
                "least_seconds": [ceilings(device).seconds(c.flops, c.bytes, c.dtype) for c in sweep.cases],
                "time_exponent": found.time_exponent,
                "memory_exponent": found.memory_exponent,
                "promised": {"time": sweep.time, "memory": sweep.memory},
            },
        )
        replay(benchmark, found.times[-1])
        if name == OURS:
            assert found.time_exponent <= sweep.time + EXPONENT_SLACK["time"]
            assert found.memory_exponent is None or found.memory_exponent <= sweep.memory + EXPONENT_SLACK["memory"]

    return hand


def pytest_terminal_summary(terminalreporter, config):
    for outcome in OUTCOMES.values():
        for line in outcome_lines(outcome):
            terminalreporter.write_line(line)
    for name, found in GROWTHS.items():
        terminalreporter.write_line(f"\n{name}")
        for contender, one in found.items():
            memory = "" if one.memory_exponent is None else f", memory beyond results ^{one.memory_exponent:.2f}"
            terminalreporter.write_line(f"  {contender:<14} time ^{one.time_exponent:.2f}{memory}")
    if saved := getattr(config, "saved", None):
        terminalreporter.write_line(f"\nkept in {saved.relative_to(ROOT)}")
