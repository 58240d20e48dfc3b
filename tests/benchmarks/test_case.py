"""Cases: made again at other sizes and in other processes, of contenders that may be absent; how errors are found."""

import dataclasses
import json
import pickle

import pytest
import torch
from benchmarks.planted import scores

from oodkern.benchmarks.case import OURS, Contender, cotangents, run_passes
from oodkern.benchmarks.machine import Ceilings
from oodkern.benchmarks.measure import ORACLE_ROWS, _of_parts, as_row, error_of, measure
from oodkern.benchmarks.rooms.energy import score

CPU = torch.device("cpu")
N = 2 * ORACLE_ROWS + 100  # the last part is not whole


def test_a_case_comes_back_from_a_pickle_and_at_other_sizes():
    one = score(op="joint_energy", N=300, K=7, dtype="bfloat16", passes="backward")
    again = pickle.loads(pickle.dumps(one))
    assert (again.name, again.sizes, list(again.contenders)) == (one.name, one.sizes, list(one.contenders))
    (logits,), upstream = one.data(CPU)
    (others,), same = again.data(CPU)
    assert torch.equal(logits, others)
    assert torch.equal(upstream, same)
    assert logits.dtype == torch.bfloat16
    larger = one.at(N=5)
    assert (larger.sizes, larger.dtype, larger.title) == ({"N": 5, "K": 7}, "bfloat16", one.title)
    assert pickle.loads(pickle.dumps(larger)).sizes == {"N": 5, "K": 7}
    with pytest.raises(TypeError, match=r"only cases of a function decorated with `case` go to other processes"):
        pickle.dumps(dataclasses.replace(one, factory=None))


def test_wrong_cases():
    one = scores(N=3)
    with pytest.raises(ValueError, match=r"passes: expected one of forward, .*, got 'sideways'"):
        dataclasses.replace(one, passes="sideways")
    with pytest.raises(ValueError, match=r"base: expected one of oodkern, eager, third, got 'lazy'"):
        dataclasses.replace(one, base="lazy")


def test_who_is_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_when_imported.py").write_text("raise RuntimeError('built for another\\nPyTorch')")
    monkeypatch.syspath_prepend(tmp_path)
    gpu = torch.device("cuda")
    assert Contender(abs).missing(CPU) is None
    assert Contender(abs, needs=("json",)).missing(CPU) is None
    assert Contender(abs, needs=("no_such_module_anywhere",)).missing(CPU) == (
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    )
    assert Contender(abs, needs=("broken_when_imported",)).missing(CPU) == "RuntimeError: built for another"
    assert Contender(abs, needs=("json", "cuda")).missing(CPU) == "has no CPU kernels"
    assert Contender(abs, needs=("json", "cuda")).missing(gpu) is None


@pytest.mark.parametrize("passes", ["forward", "backward", "double backward", "whole"])
def test_passes(passes):
    """Against autograd's own words for them."""
    x, upstream = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def function(x):
        return (x**3).sum(-1)

    found = run_passes(passes, function, (x,), upstream, (0,), cotangents((x,), (0,)))
    gradient = 3 * x**2 * upstream[:, None]
    expected = {"backward": gradient, "double backward": 6 * x * upstream[:, None] * x.cos()}.get(passes, function(x))
    torch.testing.assert_close(found if isinstance(found, torch.Tensor) else found[0], expected)
    assert not x.requires_grad


def test_contenders_that_are_told_the_upstream():
    """`told` is called with it and still differentiated; `by_hand` gives the gradients itself."""
    one = scores(N=4, D=2, K=3)
    inputs, upstream = one.data(CPU)
    seen = []

    def told(x, weight, upstream):
        seen.append(upstream)
        return (x @ weight.T).logsumexp(-1)

    def by_hand(x, weight, upstream):
        seen.append(upstream)
        return x, weight

    others = {"told": Contender(told, told=True), "by hand": Contender(by_hand, by_hand=True)}
    one = dataclasses.replace(one, contenders={**one.contenders, **others})
    for ours, theirs in zip(one.work("told", inputs, upstream)(), one.work(OURS, inputs, upstream)(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert one.work("by hand", inputs, upstream)() == inputs
    assert [found is upstream for found in seen] == [True, True]


@pytest.mark.parametrize("passes", ["forward", "backward", "double backward"])
def test_the_oracle_in_parts_is_the_oracle(passes):
    one = scores(N=N, passes=passes)
    inputs, upstream = one.data(CPU)
    parts, whole = (_of_parts(some, inputs, upstream) for some in (one, dataclasses.replace(one, rows=())))
    for part, exact in zip(parts, whole, strict=True):
        assert part.shape == exact.shape
        assert (part - exact).abs().max() <= 1e-12 * exact.abs().max()


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_is_seen(at):
    """Of 1e-3 of the largest number, in the last row of the features' gradient or in the weight's, which is a sum."""
    one = scores(N=N)
    inputs, upstream = one.data(CPU)
    result = list(one.work(OURS, inputs, upstream)())
    assert error_of(one, result, inputs, upstream) < 1e-12
    wrong = result[at].clone()
    wrong[-1, -1] += 1e-3 * wrong.abs().max()
    result[at] = wrong
    assert error_of(one, result, inputs, upstream) == pytest.approx(1e-3, rel=1e-6)
    wrong[-1, -1] = torch.nan
    assert error_of(one, result, inputs, upstream) == float("inf")


def test_errors_that_are_no_numbers():
    one = scores(N=50)
    inputs, upstream = one.data(CPU)
    features, weight = one.work(OURS, inputs, upstream)()
    with pytest.raises(ValueError, match="argument 2 is longer"):
        error_of(one, [features], inputs, upstream)
    with pytest.raises(ValueError, match=r"expected a result of shape \(5, 8\), got \(1, 8\)"):
        error_of(one, [features, weight[:1]], inputs, upstream)
    assert error_of(dataclasses.replace(one, oracle=None), [features], inputs, upstream) is None


def test_the_oracle_is_of_the_rounded_inputs():
    """What bfloat16 is wrong by is the arithmetic, not the inputs; integers stay."""
    one = scores(N=200, dtype="bfloat16")
    inputs, upstream = one.data(CPU)
    x, weight = (part.double() for part in inputs)
    exact = run_passes("backward", lambda x, weight: (x @ weight.T).logsumexp(-1), (x, weight), upstream, (0, 1))
    assert error_of(one, exact, inputs, upstream) < 1e-12
    assert 1e-4 < error_of(one, one.work(OURS, inputs, upstream)(), inputs, upstream) < 0.1


def test_measure_and_what_is_stored():
    one = scores(N=300, dtype="float32")
    outcome = measure(one, CPU, 0.0, fewest=2, memory=False)
    assert list(outcome.found) == ["oodkern", "eager"]
    assert "no_such_module_anywhere" in outcome.absent["third"]
    assert outcome.ratio("eager") == 1.0
    assert outcome.ratio() == outcome.found["eager"].times.median / outcome.found["oodkern"].times.median
    row = as_row(outcome, OURS, Ceilings(copy=1e9, products={"float32": 1e10}))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["sizes"] == {"N": 300, "D": 8, "K": 5}
    assert row["error"] < 1e-5
    assert row["peak_bytes"] is None
    assert row["least_seconds"] == pytest.approx(max(6 * 300 * 8 * 5 / 1e10, 8 * 300 * 8 / 1e9))
    assert row["roofline"] == pytest.approx(row["least_seconds"] / outcome.found[OURS].times.median)
