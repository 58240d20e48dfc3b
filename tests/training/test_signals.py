"""What ends a run before its end, and what goes on with it."""

import os
import signal
import subprocess
import sys

import pytest
from training.test_resume import silent, wait_for
from training.test_several import OPTIONS, output_of

from oodkern.training import train
from oodkern.training.files import load_checkpoint
from oodkern.training.interrupt import Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warned_process_is_resumable(tmp_path, number):
    """With all that it has started, processes that make batches among them, as schedulers do."""
    options = (*OPTIONS, "epochs=1000", "data.workers=1", f"output={tmp_path}")
    command = [sys.executable, "-m", "oodkern", "train", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    folder = tmp_path / "energy-seed0"
    wait_for(process, folder / "last.ckpt", "energy", 3)
    os.killpg(process.pid, number)
    _, error = output_of(process)
    assert f"oodkern train: stopped by {number.name}, resumable: `oodkern train" in error
    assert "Traceback" not in error
    assert load_checkpoint(folder / "last.ckpt")["training"]["step"] >= 3
    assert not (folder / "report.html").exists()


def test_a_signal_while_the_last_state_of_a_stage_is_written(short, monkeypatch):
    from oodkern.training.trainer import Trainer

    save = Trainer.save

    def signalled(self, stage):
        save(self, stage)
        if stage.kind == "pretrain" and stage.step == stage.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "save", signalled)
    config = short("name=r", "model.width=4")
    with pytest.raises(Stopped, match="SIGTERM"):
        train(config, log=silent, report=False)
    assert load_checkpoint(config.folder / "last.ckpt")["stage"] == "pretrain"
    monkeypatch.setattr(Trainer, "save", save)
    train(config, log=silent, report=False, resume=True)


def test_a_run_without_pretraining_is_resumable_from_its_start(short, monkeypatch):
    from oodkern.training.trainer import Trainer

    def stop(self, stage):
        raise Stopped("SIGTERM")

    keep = Trainer.save_best
    monkeypatch.setattr(Trainer, "save_best", stop)
    config = short("name=r", "model.width=4", "pretrain.epochs=0", "epochs=1")
    with pytest.raises(Stopped):
        train(config, log=silent, report=False)
    monkeypatch.setattr(Trainer, "save_best", keep)
    run = train(config, log=silent, report=False, resume=True)
    assert (run.folder / "best.ckpt").is_file()


def test_a_comparison_that_is_stopped_is_no_success(monkeypatch, capsys):
    from oodkern.cli import main
    from oodkern.training import comparison

    def stopped(*arguments):
        raise Stopped("SIGTERM")

    monkeypatch.setattr(comparison, "compare", stopped)
    assert main(["compare", "--methods", "oe"]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "auto"], ["--resume=auto"]])
def test_ways_to_write_resume(words, monkeypatch):
    from oodkern.cli import main
    from oodkern.verbs import train

    seen = []
    monkeypatch.setattr(train, "run", lambda options, command: seen.append((options, command)) or 0)
    assert main(["train", *words, "method=oe"]) == 0
    ((options, command),) = seen
    assert options.resume
    assert options.words == ["method=oe"]
    assert command == ["oodkern", "train", "--resume", "method=oe"]


def test_compare_is_one_process(monkeypatch, capsys):
    from oodkern.cli import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "--methods", "oe"]) == 2
    assert "compare: runs its trainings one after the other" in capsys.readouterr().err
