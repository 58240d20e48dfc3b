"""Chunks on their way: order, read-ahead, and the buffers of a GPU under streams that run as late as they please."""

from __future__ import annotations

import contextlib
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oodkern.pools import streaming
from oodkern.pools.blocks import Loaded, Loader
from oodkern.pools.opening import Opened, Part
from oodkern.pools.store import FeatureStore
from oodkern.pools.streaming import Staging, staged_chunks

CPU = torch.device("cpu")


class Event:
    """Happens when a stream comes to it; one that was never recorded has happened."""

    def __init__(self, world):
        self.world, self.recorded, self.happened = world, 0, 0

    def record(self, stream):
        self.recorded += 1
        mark = self.recorded
        stream.queue.append(("record", self, mark))
        self.world.run_some()

    def synchronize(self):
        while self.happened < self.recorded:
            self.world.step()
        self.world.run_some()


class Stream:
    def __init__(self, world):
        self.world, self.queue = world, []
        world.streams.append(self)

    def wait_event(self, event):
        self.queue.append(("wait", event, event.recorded))
        self.world.run_some()

    def wait_stream(self, other):
        event = Event(self.world)
        event.record(other)
        self.wait_event(event)

    def synchronize(self):
        while self.queue:
            self.world.step()

    def ready(self):
        return bool(self.queue) and (self.queue[0][0] != "wait" or self.queue[0][1].happened >= self.queue[0][2])

    def advance(self):
        kind, what, mark = self.queue.pop(0)
        if kind == "record":
            what.happened = max(what.happened, mark)
        elif kind == "work":
            what()


class World:
    """What Staging uses of torch.cuda. Streams run their work, in order, at random times after it was queued."""

    def __init__(self, seed):
        self.random, self.streams = random.Random(seed), []
        self.current = Stream(self)

    def Event(self):
        return Event(self)

    def Stream(self, device):
        return Stream(self)

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        with Deferred(stream):
            yield

    def step(self):
        ready = [stream for stream in self.streams if stream.ready()]
        assert ready, "the streams wait for one another"
        self.random.choice(ready).advance()

    def run_some(self):
        for _ in range(self.random.choice([0, 0, 1, 5])):
            if any(stream.ready() for stream in self.streams):
                self.step()


class Deferred(TorchDispatchMode):
    """Copies are queued on a stream, as those of a GPU are."""

    def __init__(self, stream):
        super().__init__()
        self.to = stream

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*arguments, **(keywords or {}))
        to, source = (tensor.numpy() for tensor in arguments[:2])  # whose copies are not seen here again
        self.to.queue.append(("work", lambda: np.copyto(to, source), 0))
        return arguments[0]


def staged(seed, features, rows, break_after=None, staging=Staging):
    """What a consumer's kernels see, which read their chunks whenever their stream comes to it."""
    world, seen = World(seed), []
    stage = staging(rows, features.shape[1], features.dtype, CPU, world)
    for buffer in (*stage.host, *stage.there):
        buffer.fill_(-1)
    running = stage.run(FeatureStore.of(features).chunks(rows))
    for offset, chunk in running:
        world.current.queue.append(("work", lambda o=offset, c=chunk: seen.append((o, c.clone())), 0))
        world.run_some()
        if offset == break_after:
            running.close()
            assert not stage.stream.queue  # nothing is copied into memory that is given back
    world.current.synchronize()
    return seen


def is_all(seen, features):
    ends = [(offset, offset + len(chunk)) for offset, chunk in seen]
    whole = [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]]
    return whole and torch.equal(torch.cat([chunk for _, chunk in seen]), features)


@pytest.mark.parametrize("N", [1, 10, 11, 47, 100])
def test_buffers_are_not_written_while_they_are_read(N):
    features = torch.arange(N * 3.0).view(N, 3)
    for seed in range(60):
        assert is_all(staged(seed, features, 10), features)


def test_no_rows():
    assert staged(0, torch.empty(0, 3), 10) == []


def test_a_consumer_that_stops():
    features = torch.arange(300.0).view(100, 3)
    for seed in range(20):
        seen = staged(seed, features, 10, break_after=30)
        assert is_all(seen, features[:40])


class Unrecorded(Staging):
    def hand_out(self, place, offset, there):
        self.cuda.current_stream(self.device).wait_event(self.copied[place])
        yield offset, there


class Unwaited(Staging):
    def hand_out(self, place, offset, there):
        yield offset, there
        self.free[place].record(self.cuda.current_stream(self.device))


class Overwritten(Staging):
    """Pinned memory is filled though the copy before may not be over."""

    def stage(self, place, chunk):
        host, there = self.host[place][: len(chunk)], self.there[place][: len(chunk)]
        host.copy_(chunk)
        with self.cuda.stream(self.stream):
            self.stream.wait_event(self.free[place])
            there.copy_(host, non_blocking=True)
            self.copied[place].record(self.stream)
        return there


@pytest.mark.parametrize("mistake", [Unrecorded, Unwaited, Overwritten])
def test_this_world_shows_mistakes(mistake):
    """Each event is needed: these tests fail without any one of them."""
    features = torch.arange(300.0).view(100, 3)
    assert not all(is_all(staged(seed, features, 10, staging=mistake), features) for seed in range(60))


def test_on_the_cpu_chunks_are_the_stores_own_and_the_next_is_asked_for(monkeypatch):
    features, asked = torch.randn(25, 4), []
    monkeypatch.setattr(streaming, "will_need", lambda chunk: asked.append(chunk.data_ptr()))
    store = FeatureStore.of(features)
    own = [(offset, chunk.data_ptr(), len(chunk)) for offset, chunk in store.chunks(10)]
    seen = []
    for offset, chunk in staged_chunks(store, 10, CPU):
        assert len(asked) == min(len(seen) + 1, 2)
        seen.append((offset, chunk.data_ptr(), len(chunk)))
    assert seen == own
    assert asked == [pointer for _, pointer, _ in own[1:]]
    assert [offset for offset, _ in staged_chunks(store, 10, CPU, 5, 20)] == [5, 15]


def test_asking_for_pages_changes_nothing(tmp_path):
    """Of memory and of files, at addresses that are no page's; also where the system has no such call."""
    np.save(tmp_path / "pool.npy", np.arange(30_000, dtype=np.float32).reshape(-1, 3))
    mapped = next(FeatureStore.open(tmp_path / "pool.npy").chunks(100_000))[1]
    own = torch.arange(30_000.0).view(-1, 3)
    for tensor in (mapped, own, mapped[7:2001], own[7:2001], own[:0], own[:, :2]):
        before = tensor.clone()
        streaming.will_need(tensor)
        assert torch.equal(tensor, before)
    if streaming.MADVISE is not None:
        page = mapped.data_ptr() - mapped.data_ptr() % streaming.mmap.PAGESIZE
        assert streaming.MADVISE(page, 4096, streaming.mmap.MADV_WILLNEED) == 0


def test_what_is_unpacked_goes_before_the_next_is():
    """Chunks are copies: none keeps the row group alive that it is of."""
    alive, most = [], []

    def read(number):
        alive[:] = [one for one in alive if one() is not None]
        most.append(len(alive))
        made = torch.full((10, 2), float(number))
        alive.append(weakref.ref(made.untyped_storage()))
        return made

    loader = Loader(read)
    parts = tuple(Part("f", Path("f"), number * 10, Loaded(loader, number, 10)) for number in range(4))
    store = FeatureStore(Opened(Path("f"), 2, torch.float32, parts))
    seen = torch.cat([chunk.clone() for _, chunk in staged_chunks(store, 4, CPU)])
    assert torch.equal(seen[:, 0], torch.arange(4.0).repeat_interleave(10))
    assert most == [0] * 4
