"""`score_pool` against NumPy in float64: formats, dtypes, chunks, files, errors, memory."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import oodkern
from oodkern import reference
from oodkern.pools import scoring
from oodkern.pools.score_files import ScoreFiles
from oodkern.pools.scoring import PoolScores, score_pool
from oodkern.pools.store import FeatureStore, StoreWriter
from oodkern.processes import ALONE

NAMES = ("energy", "joint_energy", "max_logit", "msp")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def head_of(K, D, dtype=torch.float32, bias=True):
    return torch.randn(K, D).to(dtype), torch.randn(K).to(dtype) if bias else None


def oracle(features, weight, bias, temperature=1.0):
    z = features.double().numpy() @ weight.double().numpy().T
    z = z if bias is None else z + bias.double().numpy()
    softplus = np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))
    top = z.max(1)
    soft = top + np.log(np.exp(z - top[:, None]).sum(1))
    hot = top + temperature * np.log(np.exp((z - top[:, None]) / temperature).sum(1))
    return {"energy": -hot, "joint_energy": softplus.sum(1), "max_logit": top, "msp": np.exp(top - soft)}


def assert_are(found, exact, tolerance=3e-6):
    for name, scores in found.items():
        assert isinstance(scores, np.memmap)
        error = np.abs(scores - exact[name]) / (1 + np.abs(exact[name]))
        assert error.max() <= tolerance, (name, error.max())


def pool(folder, features, shard_rows):
    """A store on disk, of several shards."""
    name = str(features.dtype).removeprefix("torch.")
    plan = {"rows": len(features), "dimension": features.shape[1], "dtype": name, "shard_rows": shard_rows}
    writer = StoreWriter(folder, **plan, fingerprint="", source="", facts={}, head=None, keys=False)
    for shard, part in enumerate(features.split(shard_rows)):
        writer.write(shard, part, None)
    writer.finish()
    return FeatureStore.open(folder)


@pytest.mark.parametrize("head_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, head_dtype):
    """A head of another dtype than 32 bits or the store's is rounded to these, and to nothing less."""
    features, head = torch.randn(300, 24).to(dtype), head_of(7, 24, head_dtype)
    wide = dtype == torch.float64
    scores = score_pool(features, head, NAMES, chunk_rows=128)
    assert {one.dtype for one in scores.values()} == {np.dtype(np.float64 if wide else np.float32)}
    used = [one.to(dtype if head_dtype == dtype else torch.float64 if wide else torch.float32) for one in head]
    assert_are(scores, oracle(features, *used), 1e-12 if wide else 3e-6)
    mixed = head[0], torch.randn(7)
    assert_are(score_pool(features, mixed, ("energy",)), oracle(features, *mixed), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_shards_chunks_and_blocks(dtype, tmp_path, monkeypatch):
    """Chunks that divide neither shards nor blocks; a score alone, and with others."""
    monkeypatch.setattr(scoring, "BLOCK", 640)  # 40 rows
    features, head = torch.randn(1000, 16).to(dtype), head_of(9, 16)
    store, exact = pool(tmp_path, features, 300), oracle(features, *head)
    assert len(store.shards) == 4
    for rows in (1, 77, 300, 10_000):
        assert_are(score_pool(store, head, NAMES, chunk_rows=rows), exact)
    for name in NAMES:
        alone = score_pool(store, head, (name,), chunk_rows=128)
        assert_are(alone, exact)
        np.testing.assert_array_equal(alone[name], score_pool(store, head, NAMES, chunk_rows=128)[name])
    assert_are(score_pool(store, head, ("msp", "energy")), exact)
    hot = oracle(features, *head, temperature=3.0)
    for names in (NAMES, ("energy",), ("energy", "joint_energy"), ("msp", "energy"), ("joint_energy", "msp")):
        found = score_pool(store, head, names, temperature=3.0, chunk_rows=128)
        assert tuple(found) == names
        assert_are(found, hot)
    some = torch.arange(3, 900, 7)
    assert_are(score_pool(store.subset(some), head, NAMES, chunk_rows=50), oracle(features[some], *head))


def test_plain_pytorch_forms_logits_of_blocks(monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", 640)
    features, head, seen = torch.randn(1000, 16).half(), head_of(9, 16), []
    formed = reference.linear_scores
    monkeypatch.setattr(reference, "linear_scores", lambda x, *rest: seen.append(len(x)) or formed(x, *rest))
    with oodkern.backend("reference"):
        assert_are(score_pool(features, head, NAMES, chunk_rows=500), oracle(features, *head), 1e-5)
    assert (max(seen), sum(seen)) == (40, 1000)


def test_heads():
    features = torch.randn(50, 8)
    for K, bias in ((1, True), (1, False), (3, False)):
        layer = nn.Linear(8, K, bias=bias)
        found = score_pool(features.half(), layer, NAMES)
        assert_are(found, oracle(features.half(), layer.weight.detach(), None if not bias else layer.bias.detach()))
    weight, bias = head_of(8, 8)
    assert_are(score_pool(features, (weight.T, bias)), oracle(features, weight.T, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert_are(score_pool(features, (weight, bias), NAMES), oracle(features, weight, bias))
        assert_are(score_pool(features.half(), (weight, bias), ("energy",)), oracle(features.half(), weight, bias))


def test_a_row_with_nan_has_nan_scores():
    features, head = torch.randn(20, 8).half(), head_of(4, 8)
    features[3, 2] = torch.nan
    for names in (NAMES, ("energy",), ("joint_energy",)):
        for scores in score_pool(features, head, names).values():
            assert np.isnan(scores).nonzero()[0].tolist() == [3]


def test_empty_stores(tmp_path):
    head = head_of(4, 8)
    for out in (None, tmp_path / "out"):
        for store in (torch.empty(0, 8), FeatureStore.of(torch.randn(5, 8)).subset(torch.empty(0, dtype=torch.int64))):
            assert {name: one.shape for name, one in score_pool(store, head, out=out).items()} == {
                name: (0,) for name in ("energy", "joint_energy", "msp")
            }


def test_a_folder_of_results(tmp_path):
    features, head, out = torch.randn(100, 8), head_of(4, 8), tmp_path / "new" / "scores"
    (tmp_path / "new").mkdir()
    for seen in (features, features * 2):  # a second time in its place
        scores = score_pool(seen, head, NAMES, out=out)
        assert sorted(one.name for one in out.iterdir()) == sorted(f"{name}.npy" for name in NAMES)
        for name in NAMES:
            assert Path(scores[name].filename) == out / f"{name}.npy"
            np.testing.assert_array_equal(np.load(out / f"{name}.npy"), scores[name])
        assert_are(scores, oracle(seen, *head))
    scores["energy"][:] = 7.0  # a copy-on-write map
    assert (np.load(out / "energy.npy") != 7.0).all()
    assert "energy: [100] float32" in repr(scores)


def test_what_fails_leaves_the_results_before(tmp_path):
    features, head = torch.randn(100, 8), head_of(4, 8)
    before = score_pool(features, head, out=tmp_path)["energy"].copy()

    class Broken(FeatureStore):
        def _chunks(self, rows, start, stop):
            yield from super()._chunks(rows, start, 50)
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        score_pool(Broken(FeatureStore.of(features)._opened), head, out=tmp_path, chunk_rows=10)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["energy.npy", "joint_energy.npy", "msp.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "energy.npy"), before)


def test_files_without_a_name_are_gone_with_the_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scores = score_pool(torch.randn(100, 8), head_of(4, 8))
    energy = scores["energy"]
    assert not list(tmp_path.iterdir())

    def ours():
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    assert ours() == 3
    del scores
    gc.collect()
    assert ours() == 1
    assert np.isfinite(energy).all()
    del energy
    gc.collect()
    assert ours() == 0
    opened = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    assert not any(str(tmp_path) in one for one in opened)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"store": "pool"}, TypeError, "store: expected a FeatureStore or a torch.Tensor, got str"),
        ({"store": torch.zeros(3)}, ValueError, r"store: expected \[N, D\], got \[3\]"),
        ({"store": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "store: expected one of float64.* got int64"),
        ({"head": nn.Conv2d(1, 1, 1)}, TypeError, r"head: expected an nn.Linear or a pair .*, got Conv2d"),
        ({"head": (torch.zeros(4, 8),)}, TypeError, "head: .*got 1 of them"),
        ({"head": (torch.zeros(4, 9), None)}, ValueError, r"head's weight: expected \[K, 8\].* got \[4, 9\]"),
        ({"head": (torch.zeros(0, 8), None)}, ValueError, r"head's weight: .*K >= 1, got \[0, 8\]"),
        ({"head": (torch.zeros(4, 8).int(), None)}, TypeError, "head's weight: expected one of .* got int32"),
        ({"head": (None, None)}, TypeError, "head's weight: expected a torch.Tensor, got NoneType"),
        ({"head": (torch.zeros(4, 8), torch.zeros(3))}, ValueError, r"head's bias: expected \[4\].* got \[3\]"),
        ({"scores": "energy"}, TypeError, "scores: expected names.* got 'energy'"),
        ({"scores": ()}, ValueError, "scores: expected one at least of energy, .*, got none"),
        ({"scores": ("energy", "entropy")}, ValueError, "scores: expected some of energy, .* got 'entropy'"),
        ({"scores": ("msp", "energy", "msp")}, ValueError, "scores: expected each name once, got msp, energy, msp"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows: expected 1 or more, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number.* got 0.0"),
        ({"out": __file__}, ValueError, "out: expected a folder, got the file .*test_scoring.py"),
    ],
)
def test_errors_come_before_any_work(change, error, words, tmp_path):
    given = {"store": torch.zeros(5, 8), "head": head_of(4, 8), "out": tmp_path / "out"} | change
    with pytest.raises(error, match=words):
        score_pool(**given)
    assert not (tmp_path / "out").exists()


def test_a_mapping():
    scores = score_pool(torch.randn(5, 8), head_of(4, 8), ("msp",))
    assert isinstance(scores, PoolScores)
    assert (list(scores), len(scores)) == (["msp"], 1)
    with pytest.raises(KeyError):
        scores["energy"]


def test_progress_is_counted_in_rows(capsys):
    features, head = torch.randn(500, 8), head_of(4, 8)
    score_pool(features, head)
    assert capsys.readouterr().err == ""
    score_pool(features, head, progress=True, chunk_rows=100)
    assert "scores: " in (shown := capsys.readouterr().err)
    assert "500" in shown
    assert "rows" in shown


def anonymous():
    """Bytes of this process's own memory: RssAnon."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


@pytest.mark.parametrize("names", [NAMES, ("energy",)])
def test_anonymous_memory_does_not_grow_with_rows(names, tmp_path):
    """Neither the features, 96 MB in 16 bits and twice that in 32, nor the scores, 6 MB each, are held."""
    N, D = 1_500_000, 32
    features = np.lib.format.open_memmap(tmp_path / "pool.npy", "w+", np.float16, (N, D))
    features[:] = np.random.default_rng(0).standard_normal((1, D))
    del features
    store, head, seen = FeatureStore.open(tmp_path / "pool.npy"), head_of(3, D), []
    small = score_pool(store, head, names, chunk_rows=16_384)  # what libraries take at the first call
    del small

    class Watched(FeatureStore):
        def _chunks(self, rows, start, stop):
            for one in super()._chunks(rows, start, stop):
                seen.append(anonymous())
                yield one

    before = anonymous()
    scores = score_pool(Watched(store._opened), head, names, chunk_rows=16_384)
    seen.append(anonymous())
    assert np.isfinite(scores["energy"][::1000]).all()
    assert len(seen) > 90
    assert max(seen) - before < 5e6


def test_two_at_once_in_one_folder_keep_their_scores_apart(tmp_path):
    """Each has its own, and the folder those of one of them."""
    features, names = torch.randn(50, 4), ("energy", "msp")
    with (
        ScoreFiles(names, 50, torch.float32, tmp_path, ALONE) as one,
        ScoreFiles(names, 50, torch.float32, tmp_path, ALONE) as other,
    ):
        for start in (0, 25):
            for value, files in enumerate((one, other)):
                for name in names:
                    files.write(name, start, np.full(25, value))
        found = one.finish(), other.finish()
    for value, scores in enumerate(found):
        assert all(
            (scores[name] == value).all() and scores[name].filename == tmp_path / f"{name}.npy" for name in names
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["energy.npy", "msp.npy"]
    assert (np.load(tmp_path / "energy.npy") == 1).all()
    with pytest.raises(OSError, match=r"File [Nn]ame too long"):
        ScoreFiles(("energy", "x" * 300), len(features), torch.float32, tmp_path, ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["energy.npy", "msp.npy"]
