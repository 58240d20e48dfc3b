"""`oodkern extract`, as a person calls it: killed, gone on with, told to do it again."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oodkern.classifier import Classifier
from oodkern.cli import main
from oodkern.config import load_config
from oodkern.data import build_split
from oodkern.detector import load, read_checkpoint
from oodkern.pools.extraction import SHARD_ROWS, fingerprint
from oodkern.pools.store import FeatureStore
from oodkern.training import train
from oodkern.verbs.extract import arguments

RUN = ("epochs=1", "pretrain.epochs=1", "model.width=4", "method=ce", "name=r", "threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits, and a folder of 60 images of 12 x 12 pixels, one of them no image."""
    folder = tmp_path_factory.mktemp("extract")
    threads = torch.get_num_threads()
    train(load_config(None, [*RUN, f"output={folder}"]), log=lambda line: None, report=False)
    torch.set_num_threads(threads)
    draws = np.random.default_rng(0)
    for i in range(60):
        path = folder / "images" / "class" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
    (folder / "images" / "class" / "31.png").write_bytes(b"\x89PNG no image")
    return folder


@pytest.fixture(autouse=True)
def here(run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    capsys.readouterr()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_a_folder_as_the_run_decodes_it(run, tmp_path, capsys):
    asked = ["extract", "r", "images", "--out", str(tmp_path / "pool"), "--dtype", "float32", "--shard-rows", "25"]
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path}/pool: 59 rows of 8 features, float32, in 3 shard(s), 0.0 MB, ")
    assert "1 unreadable images left out\n60 images in " in printed.out
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("oodkern extract: left out, images/class/31.png: not a readable image")
    pool = FeatureStore.open(tmp_path / "pool")
    detector = load("r")
    files = [path for path in sorted((run / "images" / "class").iterdir()) if path.name != "31.png"]
    assert pool.keys(torch.arange(59)) == [os.path.realpath(path) for path in files]
    with torch.no_grad():
        expected = detector.model.features(torch.stack([detector.read(path) for path in files]))
    torch.testing.assert_close(pool.rows(torch.arange(59)), expected, rtol=1e-5, atol=1e-6)
    assert pool.source == "folder:images"
    names = ("run", "checkpoint", "classes", "score", "threshold", "shape", "resize")
    facts = {name: pool.facts[name] for name in names}
    assert facts == {
        "run": os.path.realpath("r"),
        "checkpoint": "last",
        "classes": list("012345"),
        "score": "energy",
        "threshold": detector.threshold,
        "shape": [1, 8, 8],
        "resize": "stretch",
    }
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()}
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path}/pool is whole: 59 rows of ")
    assert printed.out.endswith("1 unreadable images left out. Nothing was done.\n")
    assert printed.err == ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").iterdir()} == before
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "pool").glob("shard-*"))
    assert main([*asked, "--dtype", "float16"]) == 2
    printed = capsys.readouterr()
    assert "float16" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("word", ["outliers", "id"])
def test_images_of_the_run(word, tmp_path, capsys):
    assert main(["extract", "r", word, "--out", str(tmp_path), "--json", "--checkpoint", "best"]) == 0
    found = json.loads(capsys.readouterr().out)
    split = build_split(load("r").config.data)
    images = split.outliers if word == "outliers" else split.train
    assert (found["rows"], found["dimension"], found["dtype"], found["shards"]) == (len(images), 8, "float16", 1)
    assert (found["unreadable"], found["extracted"], found["source"]) == (0, len(images), f"{word} of digits")
    assert found["bytes"] > 2 * 8 * len(images)
    pool = FeatureStore.open(tmp_path)
    assert pool.keys(torch.tensor([0]))[0] == f"pixels:{images.select(torch.tensor([0])).identities()[0].hex()}"
    model = load("r", "best").model
    with torch.no_grad():
        expected = model.features(images.images(torch.arange(5)))
    torch.testing.assert_close(pool.rows(torch.arange(5)).float(), expected, rtol=1e-3, atol=1e-3)
    assert main(["extract", "r", word, "--out", str(tmp_path), "--json", "--checkpoint", "best"]) == 0
    assert json.loads(capsys.readouterr().out)["extracted"] == 0


def test_the_model_that_fine_tuning_starts_with(tmp_path, capsys):
    """Its features, its head, and no threshold, which is the fine-tuned model's."""
    for checkpoint in ("baseline", "last"):
        assert main(["extract", "r", "id", "--out", str(tmp_path / checkpoint), "--checkpoint", checkpoint]) == 0
    pool, last = (FeatureStore.open(tmp_path / name) for name in ("baseline", "last"))
    detector = load("r")
    detector.model.load_state_dict(read_checkpoint(Path("r") / "last.ckpt")["baseline"])
    assert (pool.fingerprint, pool.facts["threshold"]) == (fingerprint(detector.model), None)
    assert pool.fingerprint != last.fingerprint == fingerprint(load("r").model)
    assert torch.equal(pool.head[0], detector.model.head.weight)
    chosen = ["select", str(tmp_path / "baseline"), "--count", "3", "--out", str(tmp_path / "c.npy"), "--policy"]
    capsys.readouterr()
    assert main([*chosen, "top-k", "--run", "r", "--checkpoint", "baseline"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*chosen, "margin"]) == 2
    assert "--threshold: expected a number" in capsys.readouterr().err


def test_id_images_are_left_out(tmp_path, capsys):
    assert main(["extract", "r", "digits", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "digits: 1,083 images of the ID set or its classes left out, 714 stay\n"
    assert len(FeatureStore.open(tmp_path)) == 714


def test_killed_and_gone_on_with(run, tmp_path, capsys):
    """The same command makes what is missing, to the bytes of one that nothing disturbed."""
    words = ["extract", "r", "digits", "--shard-rows", "16", "--batch-size", "4", "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*words, str(tmp_path / "whole")]) == 0
        command = [sys.executable, "-m", "oodkern", *words, str(tmp_path / "pool")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=run, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (tmp_path / "pool" / "shard-00004.npy").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("shard-*.npy")}
        assert 5 <= len(before) < 45, "killed too late to show anything"
        newest = max(before)  # which may have been on its way
        assert main([*words, str(tmp_path / "pool")]) == 0
    finally:
        torch.set_num_threads(threads)
    for name in before.keys() - {newest}:
        assert (tmp_path / "pool" / name).stat().st_mtime_ns == before[name], name
    assert contents(tmp_path / "pool") == contents(tmp_path / "whole")


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    features, calls = Classifier.features, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return features(self, images)

    monkeypatch.setattr(Classifier, "features", interrupted)
    words = ["extract", "r", "id", "--out", str(tmp_path / "a pool"), "--batch-size", "16", "--shard-rows", "16"]
    assert main(words) == 130
    again = f"oodkern extract r id --out '{tmp_path}/a pool' --batch-size 16 --shard-rows 16"
    assert capsys.readouterr().err == (
        f"oodkern extract: interrupted; `{again}` goes on with the shards that are missing\n"
    )
    monkeypatch.setattr(Classifier, "features", features)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extracted"] == found["rows"] - 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r", "nowhere"], "SOURCE: expected digits, photos or KIND:PATH with KIND one of idx, emnist"),
        (["r", "folder:none"], "folder:none: expected a folder, and none is none"),
        (["none", "id"], "none: expected the folder of a run"),
        (["r", "id", "--shard-rows", "0"], "--shard-rows: expected a number from 1 to "),
        (["r", "id", "--batch-size", "0"], "--batch-size: expected a number from 1 to "),
        (["r", "id", "--workers", "-1"], "--workers: expected a number from 0 to 256, got -1"),
        (["r", "id", "--device", "tpu"], "device: expected"),
    ],
)
def test_mistakes_are_2_and_one_line(arguments, message, tmp_path, capsys):
    assert main(["extract", *arguments, "--out", str(tmp_path / "pool")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"oodkern extract: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "pool").exists()


def test_a_folder_with_other_files_is_not_written_to(run, capsys):
    before = sorted((run / "r").iterdir())
    assert main(["extract", "r", "id", "--out", "r"]) == 2
    assert capsys.readouterr().err == (
        "oodkern extract: r: expected a new or empty folder, or a pool, and it has other files\n"
    )
    assert sorted((run / "r").iterdir()) == before


def test_the_default_is_the_library_s():
    """Which is not asked for it, since that imports PyTorch."""
    parser = argparse.ArgumentParser()
    arguments(parser)
    assert parser.parse_args(["r", "id", "--out", "p"]).shard_rows == SHARD_ROWS
    assert f"(default {SHARD_ROWS:,})" in parser.format_help()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["extract", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "  oodkern extract runs/" in printed
    assert "exit codes: 0 done, 2 wrong usage" in printed
    assert max(map(len, printed.splitlines())) <= 120
