"""The folder of a run: what is kept, what is noted, what is damaged."""

import json

import pytest
import torch

from oodkern.config import ConfigError
from oodkern.training import train
from oodkern.training.files import JSONLines, load_checkpoint


def silent(line):
    pass


def test_what_a_folder_holds_is_not_lost(short):
    """Neither the results of a run whose last.ckpt is gone, nor a configuration that a person wrote."""
    config = short("name=r")
    train(config, log=silent, report=False)
    (config.folder / "last.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"r holds best\.ckpt, scores\.npz of a run, and no last\.ckpt"):
        train(config, log=silent, report=False)
    with pytest.raises(ConfigError, match=r"no last\.ckpt to go on from: --overwrite starts anew"):
        train(config, log=silent, report=False, resume=True)
    assert (config.folder / "best.ckpt").is_file()
    train(config, log=silent, report=False, overwrite=True)

    config = short("name=mine")
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text("# my notes\nmethod: energy\n")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"mine/config\.yaml is not of a run, and would be overwritten"):
            train(config, log=silent, report=False, **options)
    assert "my notes" in (config.folder / "config.yaml").read_text()


def test_environments_are_noted(short, monkeypatch):
    """A run that goes on under other versions says so; a finished one keeps those it was made with."""
    config = short("name=r")
    train(config, log=silent, report=False)
    path = config.folder / "environment.json"
    first = json.loads(path.read_text())
    monkeypatch.setattr("oodkern.training.folder.environment", lambda: {**first, "torch": "9.9"})
    train(config, log=silent, report=False, resume=True)
    assert json.loads(path.read_text()) == first
    state = load_checkpoint(config.folder / "last.ckpt")
    torch.save({**state, "epoch": 1}, config.folder / "last.ckpt")
    for _ in range(2):
        train(config, log=silent, report=False, resume=True)
        torch.save({**state, "epoch": 1}, config.folder / "last.ckpt")
    assert json.loads(path.read_text()) == {**first, "resumed": [{**first, "torch": "9.9"}]}


def test_a_damaged_environment_stops_nothing(short):
    config = short("name=r")
    train(config, log=silent, report=False)
    for damaged in ("{", "[]"):
        (config.folder / "environment.json").write_text(damaged)
        train(config, log=silent, report=False, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a file", b"\x80\x02."])
def test_a_damaged_checkpoint_is_named(short, content):
    config = short("name=r")
    config.folder.mkdir(parents=True)
    (config.folder / "last.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"r/last\.ckpt: (not a readable checkpoint|expected a checkpoint of format)"):
        train(config, log=silent, report=False, resume=True)
    assert (config.folder / "last.ckpt").read_bytes() == content


def test_a_checkpoint_of_another_format(short):
    config = short("name=r")
    config.folder.mkdir(parents=True)
    torch.save({"format": 99}, config.folder / "last.ckpt")
    with pytest.raises(ConfigError, match="expected a checkpoint of format 1, got 99"):
        train(config, log=silent, report=False, resume=True)


def test_the_log_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JSONLines(path) as lines:
        lines.write(a=1)
        size = lines.sync()
        lines.write(a=2)
    with JSONLines(path, size) as lines:
        lines.write(a=3)
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3]
