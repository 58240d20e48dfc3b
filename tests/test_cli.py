"""The command line as a person calls it: a process, its output, its exit code."""

import subprocess
import sys

import pytest

from oodkern.cli import main


def call(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "oodkern", *arguments], capture_output=True, text=True, cwd=cwd)


def test_bare_train_prints_one_table(tmp_path):
    done = call("train", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = [line.split()[:4] for line in done.stdout.splitlines() if line.startswith(("baseline", "energy "))]
    assert [(row[0], row[1]) for row in rows] == [("baseline", "msp")] * 2 + [("baseline", "energy")] * 2 + [
        ("energy", "energy")
    ] * 2
    assert max(map(len, done.stdout.splitlines())) <= 110
    assert "runs/energy-seed0" in done.stdout
    assert (tmp_path / "runs" / "energy-seed0" / "last.ckpt").is_file()


def test_wrong_usage_is_2_and_one_line(tmp_path):
    done = call("train", "optimizer.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "oodkern train: optimizer.lrr: no such key (did you mean optimizer.lr?)"
    assert not (tmp_path / "runs").exists()


def test_not_finite_is_3(tmp_path, capsys):
    # A learning rate at which float32 overflows.
    code = main(["train", f"output={tmp_path}", "pretrain.lr=1e30", "pretrain.epochs=2", "--quiet"])
    assert code == 3
    assert "the loss is" in capsys.readouterr().err


def test_interrupt_is_130(tmp_path, monkeypatch, capsys):
    import oodkern.training

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(oodkern.training, "train", interrupted)
    assert main(["train", f"output={tmp_path}"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_show_prints_every_key(capsys):
    assert main(["train", "--show", "method=oe", "loss.alpha=0.3"]) == 0
    printed = capsys.readouterr().out
    assert "method: oe" in printed
    assert "  alpha: 0.3" in printed


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "oodkern train method=oe" in printed
    assert "exit codes" in printed


def test_doctor(tmp_path):
    done = call("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "energy on cpu: native" in done.stdout
    assert "in use" in done.stdout
