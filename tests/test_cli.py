"""The command line as a person calls it: a process, its output, its exit code."""

import subprocess
import sys

import pytest

from oodkern import _native
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


def test_divergence_on_the_last_step_is_3_and_leaves_no_other_run(tmp_path, capsys):
    arguments = [f"output={tmp_path}", "name=r", "pretrain.epochs=1", "epochs=1"]
    assert main(["train", *arguments, "--quiet"]) == 0
    assert (tmp_path / "r" / "last.ckpt").is_file()
    code = main(["train", *arguments, "epochs=0", "optimizer.batch_size=758", "pretrain.lr=1e30", "--quiet"])
    assert code == 3
    assert "not finite after pretrain" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"config.yaml", "environment.json", "metrics.jsonl"}


def test_a_file_with_an_equals_sign_in_its_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "c.yaml").write_text("seed: 77\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--show", "lr=1/c.yaml"]) == 0
    assert "seed: 77" in capsys.readouterr().out


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
    assert f"in use {_native.instruction_set_in_use()}" in done.stdout


def test_doctor_without_the_module_that_tells(tmp_path):
    """The module is for one version of Python, the kernels for all."""
    program = "import sys; sys.modules['oodkern._build'] = None; from oodkern.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "what was built is not known" in done.stdout
    assert "energy on cpu: native" in done.stdout
