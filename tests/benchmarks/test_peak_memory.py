"""What a work holds at most, taken in a fresh process: against works that hold a known amount, and otherwise."""

import subprocess
import sys

import pytest
import torch
from benchmarks.planted import MB, floats, known, memory, scores

from oodkern.benchmarks import memory as module
from oodkern.benchmarks.case import OURS
from oodkern.benchmarks.measure import measure
from oodkern.benchmarks.memory import NotMeasured, peaks_of, result_bytes
from oodkern.benchmarks.rooms.energy import score

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux keeps the peak that is read")
NOISE = 3 * MB
N, K = 16_384, 1_000

# The eager energy with its gradient, in words of its own, and the peak that the system gives of the whole process. A
# small one before loads code, which is not the work's.
PROGRAM = f"""
import sys, torch
torch.set_num_threads(1)
def work(logits, upstream):
    return torch.autograd.grad(-torch.logsumexp(logits, -1), logits, upstream)
work(torch.randn(9, 9).requires_grad_(), torch.randn(9))
logits = torch.randn({N}, {K}).mul_(4).requires_grad_()
upstream = torch.randn({N})
if sys.argv[1] == "works":
    result = work(logits, upstream)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@linux
def test_what_is_touched_counts_and_what_the_parent_holds_does_not():
    held = torch.ones(floats(300))
    one = memory(temporary=64, result=16)
    (touched,), (untouched,) = peaks_of([one], OURS), peaks_of([one], "eager")
    assert touched.bytes == pytest.approx(80 * MB, abs=NOISE)
    assert touched.beyond == pytest.approx(64 * MB, abs=NOISE)
    assert touched.result == untouched.result == 4 * floats(16)
    assert untouched.bytes <= NOISE
    assert untouched.beyond == 0
    assert held[-1] == 1


@linux
def test_holes_of_a_heap_do_not_count():
    (peak,) = peaks_of([known()], "holes")
    assert peak.beyond == pytest.approx(44 * MB, abs=NOISE)


@linux
def test_cases_one_after_the_other_do_not_see_each_other():
    ones = [memory(temporary=size, result=4) for size in (96, 8, 32)]
    assert [peak.beyond for peak in peaks_of(ones, OURS)] == pytest.approx([96 * MB, 8 * MB, 32 * MB], abs=NOISE)


@linux
def test_against_the_peaks_of_whole_processes():
    """Two processes of another program, of which one makes the inputs and one works as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (found,) = peaks_of([score(N=N, K=K, dtype="float32", passes="backward")], "eager")
    finally:
        torch.set_num_threads(threads)
    calls = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, word], stdout=subprocess.PIPE) for word in ("rests", "works")
    ]
    rests, works = (int(call.communicate()[0]) for call in calls)
    assert works - rests > N * K * 4, "the gradient at least"
    assert found.bytes == pytest.approx(works - rests, abs=10 * MB)


@linux
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"planted: known, .*: fails: ValueError: no luck with x"),
        ("ends", r"planted: known, .*: the process of ends ended with exit code 7"),
    ],
)
def test_a_process_that_fails_says_so(name, message):
    with pytest.raises(RuntimeError, match=message):
        peaks_of([known()], name)


def test_where_it_cannot_be_measured(monkeypatch):
    """There is no number then, and the rest is measured."""
    monkeypatch.setattr(module, "RESET", "/nowhere/clear_refs")
    one = scores(N=20)
    with pytest.raises(NotMeasured, match=r"/nowhere/clear_refs is not to be written here"):
        peaks_of([one], OURS)
    found = measure(one, torch.device("cpu"), 0.0, fewest=1).found
    assert [each.peak for each in found.values()] == [None, None]


@linux
def test_memory_of_some_contenders_alone():
    found = measure(scores(N=20), torch.device("cpu"), 0.0, fewest=1, memory=(OURS,)).found
    assert found[OURS].peak is not None
    assert found["eager"].peak is None


def test_bytes_of_results():
    x = torch.zeros(10, 3)
    assert result_bytes((x, [x[:2].half(), {"a": x.bool()}], 3, None)) == 120 + 12 + 30
