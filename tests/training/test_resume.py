"""A run that is killed or interrupted goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from oodkern.config import ConfigError, load_config
from oodkern.training import load_run, train
from oodkern.training.files import load_checkpoint, read_json_lines
from oodkern.training.random_state import random_state, seed_everything, set_random_state

OPTIONS = ("epochs=6", "pretrain.epochs=6", "model.width=8", "model.dropout=0.2", "checkpoint_steps=3", "threads=1")
TIMED = ("seconds", "images_per_second", "pool_seconds")


def silent(line):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    config = load_config(None, [*OPTIONS, f"output={tmp_path_factory.mktemp('whole')}"])
    threads = torch.get_num_threads()
    run = train(config, log=silent, report=False)
    torch.set_num_threads(threads)
    return run


def start(folder, *extra):
    command = [sys.executable, "-m", "oodkern", "train", *OPTIONS, f"output={folder}", "--quiet", *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, checkpoint, stage, step):
    """Until the checkpoint says that the run is in a stage, past a step."""
    deadline = time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()
        if checkpoint.exists():
            state = load_checkpoint(checkpoint)
            if state["stage"] == stage and state["training"]["step"] >= step:
                return
        time.sleep(0.002)
    raise AssertionError("the run did not get there")


def same(one, other):
    """Equal to the bit, whatever is nested."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key not in TIMED)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_the_same(folder, whole):
    for name in ("last.ckpt", "best.ckpt"):
        one, other = load_checkpoint(folder / name), load_checkpoint(whole.folder / name)
        for key in one.keys() - {"log_bytes", *TIMED}:  # lines hold times, whose digits differ in number
            assert same(one[key], other[key]), (name, key)
    lines, expected = (read_json_lines(path / "metrics.jsonl") for path in (folder, whole.folder))
    assert same(lines, expected)
    scores, known = np.load(folder / "scores.npz"), np.load(whole.folder / "scores.npz")
    assert all((scores[name] == known[name]).all() for name in known)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, whole, workers):
    folder, extra = tmp_path / "energy-seed0", f"data.workers={workers}"
    for stage, step in (("pretrain", 3), ("pretrain", 33), ("energy", 21)):
        process = start(tmp_path, extra, "--resume")
        wait_for(process, folder / "last.ckpt", stage, step)
        process.kill()
        process.wait()
        state = load_checkpoint(folder / "last.ckpt")
        assert state["stage"] == stage
        assert state["training"]["step"] < 60, "killed too late to show anything"
    process = start(tmp_path, extra, "--resume")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "resuming" in out
    check_the_same(folder, whole)
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_a_resumable_run(tmp_path, whole, workers):
    folder = tmp_path / "energy-seed0"
    process = start(tmp_path, f"data.workers={workers}")
    wait_for(process, folder / "last.ckpt", "energy", 10)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, (out, error)
    assert "interrupted; `oodkern train" in error
    assert error.strip().endswith("--resume` goes on")
    assert "Traceback" not in error
    state = load_checkpoint(folder / "last.ckpt")
    assert 10 <= state["training"]["step"] < 60
    config = load_config(str(folder / "config.yaml"))
    threads = torch.get_num_threads()
    train(config, log=silent, resume=True, report=False)
    torch.set_num_threads(threads)
    check_the_same(folder, whole)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resuming_in_16_bits(short, monkeypatch, precision):
    """The scaler of float16 gradients, whose scale decides which steps are taken, is part of the state."""
    from oodkern.training.stage import Stage

    options = (f"precision={precision}", "model.width=8", "epochs=1", "pretrain.epochs=1", "checkpoint_steps=1")
    whole = train(short("name=whole", *options), log=silent, report=False)
    advance = Stage.advance

    def stop(self):
        if self.kind == "method" and self.step == 4:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Stage, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        train(short("name=stopped", *options), log=silent, report=False)
    monkeypatch.setattr(Stage, "advance", advance)
    resumed = train(short("name=stopped", *options), log=silent, resume=True, report=False)
    check_the_same(resumed.folder, whole)
    state = load_checkpoint(resumed.folder / "last.ckpt")["training"]["scaler"]
    assert bool(state) == (precision == "fp16")


def test_the_best_epoch_is_remembered(short, monkeypatch):
    """A later epoch that is worse than the best one before the stop does not take its place."""
    from oodkern.training.trainer import Trainer

    values = {1: 0.9, 2: 0.95, 3: 0.7, 4: 0.8}

    def validate(self, stage):
        self.threshold = 0.0
        return {"validation_accuracy": 0.5, "validation_auroc": values.get(stage.epoch, 0.1)}

    save, options = Trainer.save, ("name=r", "epochs=4", "model.width=4")

    def stop(self, stage):
        save(self, stage)
        if stage.kind == "method" and stage.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "validate", validate)
    monkeypatch.setattr(Trainer, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(short(*options), log=silent, report=False)
    monkeypatch.setattr(Trainer, "save", save)
    run = train(short(*options), log=silent, report=False, resume=True)
    assert load_checkpoint(run.folder / "best.ckpt")["epoch"] == 2


def test_a_run_that_stopped_within_an_epoch_judges_nothing(short, monkeypatch):
    """Its threshold would be of other weights, or of none."""
    from oodkern.training.stage import Stage

    advance = Stage.advance

    def stop(self):
        if self.kind == "method" and self.step == 14:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Stage, "advance", stop)
    config = short("name=r", "checkpoint_steps=1")
    with pytest.raises(KeyboardInterrupt):
        train(config, log=silent, report=False)
    with pytest.raises(ConfigError, match=r"r/last\.ckpt: the run stopped within an epoch.*--checkpoint best"):
        load_run(config.folder)
    assert load_run(config.folder, "best").epoch == 1
    monkeypatch.setattr(Stage, "advance", advance)
    train(config, log=silent, report=False, resume=True)
    assert load_run(config.folder).epoch == 2


def test_other_images_are_not_the_runs(short, digits):
    """Images that a program gives are known by name; their classes and numbers tell the rest."""
    train(short("name=r"), log=silent, report=False, split=digits)
    fewer = replace(digits, train=digits.train.select(torch.arange(600)))
    with pytest.raises(ConfigError, match=r"data: the run in .* has images .*'train': 644.*, got .*'train': 600"):
        train(short("name=r"), log=silent, report=False, resume=True, split=fewer)
    renamed = replace(digits, classes=tuple("abcdef"))
    with pytest.raises(ConfigError, match=r"data: the run in .* has classes"):
        train(short("name=r"), log=silent, report=False, resume=True, split=renamed)


def test_a_finished_run_is_judged_again(short, whole):
    config = short("name=done")
    first = train(config, log=silent, report=False)
    again = train(config, log=silent, report=False, resume=True)
    assert again.method.ood == first.method.ood
    assert same(read_json_lines(config.folder / "metrics.jsonl"), first.history)


def test_another_configuration_is_not_resumed(short):
    train(short("name=r"), log=silent, report=False)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: the run in .* has 0\.01, got 0\.5; resume it as it was"):
        train(short("name=r", "optimizer.lr=0.5"), log=silent, report=False, resume=True)
    train(short("name=r", "data.workers=1", "checkpoint_steps=5"), log=silent, report=False, resume=True)
    with pytest.raises(ConfigError, match="--resume, --overwrite: expected one of them"):
        train(short("name=r"), log=silent, report=False, resume=True, overwrite=True)


def test_the_random_state_comes_back(tmp_path):
    import random

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn()

    seed_everything(5)
    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    seed_everything(6)
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
