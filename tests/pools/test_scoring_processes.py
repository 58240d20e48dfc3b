"""`score_pool` in several processes of a job: each takes chunks, and all have all scores, those of one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from oodkern.pools import heartbeat, scoring
from oodkern.pools.scoring import score_pool
from oodkern.pools.store import FeatureStore
from oodkern.processes import Elsewhere, Processes

NAMES = ("energy", "joint_energy", "max_logit", "msp")


class Broken(FeatureStore):
    def _chunks(self, rows, start, stop):
        raise RuntimeError("a broken disk")


def scored(folder):
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    scoring.PIECE_ROWS = 1000
    store = FeatureStore.open(Path(folder) / "pool.npy")
    head = torch.randn(37, 24), torch.randn(37)
    out = Path(folder) / "out"
    for rows in (600, 100_000):  # a part each, and nothing but the last process's
        for names in (NAMES, ("energy",)):
            alone = score_pool(store, head, names, chunk_rows=rows)
            shared = score_pool(store, head, names, chunk_rows=rows, processes=of, out=out)
            assert (shared["energy"].filename is not None) == of.first
            for name in names:
                np.testing.assert_array_equal(shared[name], alone[name])  # bit for bit
                assert len(shared[name]) == 5000
    wide = FeatureStore.of(torch.randn(50, 24, dtype=torch.float64))
    for name, one in score_pool(wide, head, NAMES, chunk_rows=7, processes=of).items():
        np.testing.assert_array_equal(one, score_pool(wide, head, NAMES, chunk_rows=7)[name])
    nothing = score_pool(torch.empty(0, 24), head, processes=of)
    assert nothing["msp"].shape == (0,)

    broken = store if of.first else Broken(store._opened)
    with pytest.raises(Elsewhere if of.first else RuntimeError):
        score_pool(broken, head, out=out, processes=of)
    (Path(folder) / "file").touch()
    with pytest.raises(NotADirectoryError if of.first else Elsewhere):
        score_pool(store, head, out=Path(folder) / "file" / "out", processes=of)
    return alone["energy"].tobytes()


def one_alone_first(patience):
    """The first scores something by itself, say for a log, before all score together."""
    heartbeat.PATIENCE = timedelta(seconds=patience)
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    store, head = torch.randn(100, 8), (torch.randn(3, 8), None)
    if of.first:
        score_pool(store, head)
    return len(score_pool(store, head, processes=of)["energy"])


def test_who_scores_alone_is_not_counted():
    assert processes.run(one_alone_first, 2, 6.0) == [100, 100]


def test_two_processes_have_the_scores_of_one(tmp_path):
    features = torch.randn(5000, 24).half()
    np.save(tmp_path / "pool.npy", features.numpy())
    first, second = processes.run(scored, 2, str(tmp_path))
    assert first == second
    written = np.load(tmp_path / "out" / "energy.npy")
    assert written.tobytes() == first
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == sorted(f"{name}.npy" for name in NAMES)


def test_shares_are_whole_chunks_of_all_shards(tmp_path):
    store = FeatureStore.of(torch.randn(101, 4)).subset(torch.arange(0, 101, 2))
    for count in (1, 2, 3, 7):
        rows = [scoring._share(store, 8, Processes(rank, count)) for rank in range(count)]
        assert [one.start for one in rows] == [0, *(one.stop for one in rows[:-1])]
        assert rows[-1].stop == len(store) == 51
        assert all(one.start % 8 == 0 for one in rows if one.start < 51)
