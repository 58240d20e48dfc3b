"""The folder `benches`: its lists of cases keep to the rules, and all of it runs."""

import importlib
import os
import resource
import subprocess
import sys

import pytest

from oodkern.benchmarks.case import COMPILED, OURS, Case

ALWAYS = ("eager", COMPILED, "chunked")
# Why a case of a room does without one of them, by its title.
WITHOUT = {
    ("sample_norm, double backward", COMPILED): "torch.compile refuses to be differentiated twice",
    ("pairwise_hinge, backward", "chunked"): "of more pairs than 2^24, which take seconds",
}
ROOMS = "oodkern.benchmarks.rooms."  # what bench files themselves make is whole steps, loops, a system's pages


@pytest.fixture(scope="module")
def lists(root):
    """CASES or so, GPU and the cases of GROWTH of every module of `benches` that has cases, by its name."""
    sys.path.insert(0, str(root / "benches"))
    try:
        names = [path.stem for path in (root / "benches").glob("bench_*.py") if "contests(" in path.read_text()]
        modules = {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(root / "benches"))
        for name in ("runner", *names):
            sys.modules.pop(name, None)
    return {name: lists_of(module) for name, module in modules.items()}


def lists_of(module):
    """A module may have more lists than CASES, under other names."""
    made = {name: one for name, one in vars(module).items() if isinstance(one, list)}
    made = {name: one for name, one in made.items() if one and all(isinstance(each, Case) for each in one)}
    gpu = made.pop("GPU", [])
    return [case for one in made.values() for case in one], gpu, [sweep.case for sweep in getattr(module, "GROWTH", [])]


def test_every_room_is_measured(lists, root):
    rooms = {path.stem for path in (root / "oodkern" / "benchmarks" / "rooms").glob("*.py")} - {"__init__", "common"}
    measured = {case.factory.__module__ for found in lists.values() for case in found[0]}
    assert {ROOMS + room for room in rooms} <= measured


def test_who_is_compared(lists):
    """Ours first; the base and what one would write instead always, or a reason why not."""
    for cases, gpu, growing in lists.values():
        assert cases
        for case in (*cases, *gpu, *growing):
            names = list(case.contenders)
            excused = [name for title, name in WITHOUT if title == case.title]
            of_room = case.factory.__module__.startswith(ROOMS)
            assert not of_room or {OURS, *ALWAYS} <= {*names, *excused}, case.name
            assert OURS not in names or names[0] == OURS, case.name
            assert case.base in names, case.name
            assert not any(case.contenders[name].needs for name in names if name in (OURS, case.base, *ALWAYS))
            assert [one.compiled for one in case.contenders.values()] == [name == COMPILED for name in names], case.name
            assert case.dtype in ("float32", "bfloat16") or not of_room, case.name
            assert case.oracle or case.error or not of_room, f"{case.name}: no one says how wrong it is"


def test_names_are_unique(lists):
    for at in (0, 1):
        names = [case.name for found in lists.values() for case in found[at]]
        assert len(names) == len(set(names))


@pytest.mark.slow
def test_all_run(root):
    """At tiny sizes, nothing compiled: every contender that is installed, and the errors of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    before = children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benches", "--benchmark-only", "--smoke", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert children_seconds() - before < 90, "seconds of one core, however busy the machine is"


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
