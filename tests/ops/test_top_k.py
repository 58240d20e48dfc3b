"""Room `select`: the k best of a stream."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import FLOATS
from oracle import memory_events

import oodkern
from oodkern import TopK, _native


def by_sorting(scores, k, largest, offset=0):
    """Python's sort of everything."""
    numbers = scores.double().tolist()
    order = sorted(
        (i for i, x in enumerate(numbers) if not math.isnan(x)),
        key=lambda i: (-numbers[i] if largest else numbers[i], i),
    )[:k]
    return scores[order], torch.tensor(order, dtype=torch.int64) + offset


def check(top, scores, offset=0):
    values, indices = top.result()
    expected, order = by_sorting(scores, top.k, top.largest, offset)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, order)
    assert torch.equal(values, expected.to(values.dtype))
    assert values.dtype == torch.promote_types(scores.dtype, torch.float32)
    assert top.seen == len(scores)
    assert top.nans == int(scores.isnan().sum())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_chunks_in_any_order(data):
    dtype = data.draw(st.sampled_from(FLOATS))
    n, k = data.draw(st.integers(0, 700)), data.draw(st.sampled_from((1, 2, 7, 64, 100, 1000)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    if data.draw(st.booleans()):  # many equal ones
        scores = (scores * 2).round()
    if n and data.draw(st.booleans()):
        special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype)
        places = torch.randint(0, n, (n // 4 + 1,), generator=generator)
        scores[places] = special[torch.randint(0, 5, places.shape, generator=generator)]
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    chunks = list(zip([0, *cuts], [*cuts, n], strict=True))
    if data.draw(st.booleans()):
        chunks = data.draw(st.permutations(chunks))
    offset = data.draw(st.sampled_from((0, 5, 2**31 - 100, 2**40)))
    top = TopK(k, largest=data.draw(st.booleans()))
    for begin, end in chunks:
        chunk = scores[begin:end]
        if data.draw(st.booleans()):
            chunk = torch.stack([chunk, chunk], 1)[:, 1]
        with oodkern.backend(data.draw(st.sampled_from(("native", "native", "reference")))):
            top.update(chunk, offset + begin)
    if not chunks or top.seen == 0:
        assert len(top.result().values) == 0
        return
    check(top, scores, offset)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("largest", [True, False])
def test_every_instruction_set(dtype, largest):
    scores = torch.randn(30_000).to(dtype)
    scores[::777] = torch.nan
    for name in _native.instruction_sets():
        with _native.instruction_set(name):
            for k in (1, 50, 3000):
                top = TopK(k, largest)
                for begin in range(0, 30_000, 7001):
                    top.update(scores[begin : begin + 7001], begin)
                check(top, scores)


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_worst_cases(order):
    """Every score passes the threshold, or none does, or all are equal and the first ones are the best."""
    scores = {"rising": torch.arange(40_000.0), "falling": -torch.arange(40_000.0), "equal": torch.ones(40_000)}[order]
    for backwards in (False, True):
        top = TopK(500)
        starts = range(0, 40_000, 5000)
        for begin in reversed(starts) if backwards else starts:
            top.update(scores[begin : begin + 5000], begin)
        check(top, scores)


def test_any_number_of_threads_gives_the_same():
    scores = (torch.randn(500_000) * 50).round()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            top = TopK(700)
            top.update(scores[200_000:], 200_000)
            top.update(scores[:200_000], 0)
            check(top, scores)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_killed_scan_goes_on(dtype, backend):
    scores = torch.randn(9000).to(dtype)
    scores[4] = torch.nan
    with oodkern.backend(backend):
        for stop in (0, 100, 3000):
            top = TopK(150, largest=False)
            top.update(scores[:stop], 0)
            file = io.BytesIO()
            torch.save(top.state_dict(), file)
            file.seek(0)
            again = TopK(150, largest=False)
            again.load_state_dict(torch.load(file, weights_only=True))
            assert again.seen == stop
            again.update(scores[again.seen :], again.seen)
            check(again, scores)
    before = again.result()
    again.load_state_dict(again.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, again.result(), strict=True))


def test_the_state_is_a_copy():
    top = TopK(3)
    top.update(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0)
    state = top.state_dict()
    values, indices = top.result()
    top.update(torch.tensor([9.0, 8.0, 7.0]), 4)
    assert state["values"].tolist() == values.tolist() == [4.0, 3.0, 2.0]
    assert indices.tolist() == [3, 2, 1]
    other = TopK(3)
    other.load_state_dict(state)
    other.update(torch.tensor([9.0]), 4)
    assert state["values"].tolist() == [4.0, 3.0, 2.0]


def test_state_of_another_is_refused():
    top = TopK(3)
    with pytest.raises(ValueError, match="k: expected 4 as this TopK has, got 3"):
        TopK(4).load_state_dict(top.state_dict())
    with pytest.raises(ValueError, match="largest: expected False as this TopK has, got True"):
        TopK(3, largest=False).load_state_dict(top.state_dict())
    restored = TopK(3)
    restored.load_state_dict(top.state_dict())
    assert restored.seen == 0
    assert restored.result().values.shape == (0,)


def test_memory_is_that_of_k():
    top = TopK(100)
    top.update(torch.randn(1000), 0)
    scores = torch.randn(1_000_000)
    held = sum(change for change in memory_events(lambda: top.update(scores, 1000)) if change > 0)
    assert held < 10_000
    assert len(top._values) == 200
    assert top.state_dict()["values"].shape == (100,)


def test_gradients_are_not_followed():
    top = TopK(2)
    top.update(torch.randn(5, requires_grad=True) * 2, 0)
    assert not top.result().values.requires_grad


def test_raw_op():
    op = torch.ops.oodkern.top_k_update.default
    for dtype in FLOATS:
        values = torch.zeros(74, dtype=torch.promote_types(dtype, torch.float32))
        arguments = (torch.randn(200).to(dtype), 7, 10, True, values, torch.zeros(74).long(), torch.zeros(3).long())
        torch.library.opcheck(op, arguments)
    good = [torch.randn(9), 0, 10, True, torch.zeros(74), torch.zeros(74).long(), torch.zeros(3).long()]
    for place, wrong, message in (
        (0, torch.ones(2, 2), "scores: expected"), (2, 0, "k: expected"), (4, torch.zeros(73), "values: expected"),
        (4, torch.zeros(74).double(), "values: expected"), (5, torch.zeros(74), "indices: expected"),
        (6, torch.zeros(2).long(), "state: expected three"), (6, torch.tensor([74, 0, 0]), "state: expected what"),
        (6, torch.tensor([5, 1, 0]), "state: expected what"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(*[wrong if i == place else argument for i, argument in enumerate(good)])


def test_rejects_what_it_cannot_compute():
    with pytest.raises(ValueError, match="k: expected 1 or more, got 0"):
        TopK(0)
    with pytest.raises(TypeError, match="k: expected an integer, got float"):
        TopK(2.0)
    with pytest.raises(TypeError, match="largest: expected True or False, got int"):
        TopK(2, 1)
    top = TopK(2)
    with pytest.raises(TypeError, match=r"scores: expected a torch\.Tensor, got list"):
        top.update([1.0], 0)
    with pytest.raises(TypeError, match="got int64"):
        top.update(torch.arange(3), 0)
    with pytest.raises(ValueError, match=r"scores: expected \[n\], one number a sample, got \[2, 2\]"):
        top.update(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="offset: expected 0 or more, got -1"):
        top.update(torch.ones(2), -1)
    top.update(torch.ones(2), 0)
    with pytest.raises(ValueError, match="expected what the first update gave, float32 on cpu, got float64 on cpu"):
        top.update(torch.ones(2).double(), 2)
    assert top.seen == 2
