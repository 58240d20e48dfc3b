"""Runs of several processes: started by torchrun, stopped, killed and resumed; and what their logs say."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from training.test_resume import check_the_same, same, silent, wait_for

from oodkern.config import ConfigError, load_config
from oodkern.processes import Processes
from oodkern.training import evaluate, load_run, train
from oodkern.training.files import load_checkpoint, read_json_lines
from oodkern.training.several import check_several, what_differs
from oodkern.training.start import build_classifier

CPU = torch.device("cpu")
OPTIONS = ("epochs=6", "pretrain.epochs=1", "model.width=8", "model.dropout=0.2", "checkpoint_steps=2", "threads=1")


def torchrun(folder, *extra, count=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "oodkern", "train", *OPTIONS, f"output={folder}", *extra]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def children(process):
    """The processes of a job: of Linux, where /proc tells."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and "oodkern" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return sorted(found)


def output_of(process, code=0):
    out, error = process.communicate(timeout=120)
    if process.returncode != code:  # as lines: one of a repr is cut where logs are kept
        pytest.fail(f"expected exit code {code}, got {process.returncode}\n{out}\n{error}")
    return out, error


def own_lines(error):
    return [line for line in error.splitlines() if line.startswith("oodkern train: ")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes that nothing disturbs: its folder and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    out, _ = output_of(torchrun(folder))
    return folder / "energy-seed0", out


class Whole:
    def __init__(self, folder):
        self.folder = folder


def test_two_processes_write_one_run(whole):
    folder, out = whole
    assert out.count("energy    energy") == 2  # the table, once
    assert "2 processes: batch sizes are of all of them" in out
    assert "each process normalises its share by its own statistics" in out
    names = {path.name for path in folder.iterdir() if path.is_file()}
    expected = {
        "best.ckpt",
        "config.yaml",
        "environment.json",
        "last.ckpt",
        "metrics.jsonl",
        "report.html",
        "scores.npz",
    }
    assert names == expected
    steps = [line["step"] for line in read_json_lines(folder / "metrics.jsonl") if "step" in line]
    assert steps == [10, *range(10, 61, 10)]
    state = load_checkpoint(folder / "last.ckpt")
    assert state["processes"] == 2
    assert not same(state["random"], state["random_of_others"][0])  # dropout of its own


def test_metrics_are_of_every_image_once(whole, digits):
    """325 test images in shares of 162 and 163: what one process finds on the same model."""
    folder, _ = whole
    scores = np.load(folder / "scores.npz")
    assert len(scores["id"]) == len(digits.test)
    detector = load_run(folder)
    found = evaluate(detector.model, digits, "energy", detector.method.score)
    np.testing.assert_allclose(scores["id"], found.scores["id"].numpy(), rtol=1e-4, atol=1e-5)
    result = read_json_lines(folder / "metrics.jsonl")[-1]
    assert result["accuracy"] == pytest.approx(found.accuracy)
    assert result["ood"]["far"]["auroc"] == pytest.approx(found.ood["far"].auroc, abs=1e-5)


def test_killed_warned_and_resumed_is_bit_for_bit_the_same(tmp_path, whole):
    """SIGKILL to all, then a warning to one of them, after which all stop at the same step."""
    folder = tmp_path / "energy-seed0"
    process = torchrun(tmp_path, "--resume", "auto")
    wait_for(process, folder / "last.ckpt", "energy", 4)
    assert load_checkpoint(folder / "last.ckpt")["training"]["step"] < 40, "killed too late to show anything"
    for one in [*children(process), process.pid]:
        os.kill(one, signal.SIGKILL)
    process.communicate()
    process = torchrun(tmp_path, "--resume", "auto")
    wait_for(process, folder / "last.ckpt", "energy", load_checkpoint(folder / "last.ckpt")["training"]["step"] + 2)
    os.kill(children(process)[1], signal.SIGUSR1)
    out, error = output_of(process)
    assert "resuming" in out
    (line,) = own_lines(error)
    assert line.startswith("oodkern train: stopped by SIGUSR1, resumable: `torchrun ... -m oodkern train ")
    assert line.endswith("--resume` goes on")
    assert load_checkpoint(folder / "last.ckpt")["training"]["step"] < 60, "stopped too late to show anything"
    output_of(torchrun(tmp_path, "--resume", "auto"))
    check_the_same(folder, Whole(whole[0]))


def test_a_lost_process_ends_the_job_with_one_line(tmp_path):
    process = torchrun(tmp_path, "epochs=1000")
    wait_for(process, tmp_path / "energy-seed0" / "last.ckpt", "energy", 4)
    os.kill(children(process)[1], signal.SIGKILL)
    started = time.time()
    _, error = process.communicate(timeout=100)
    assert time.time() - started < 60
    assert process.returncode != 0
    (line,) = own_lines(error)
    assert "another process of the job ended, or no longer answers" in line
    assert "--resume goes on from the last checkpoint" in line


def test_an_error_of_all_is_told_once(tmp_path):
    process = torchrun(tmp_path, "data.name=folder:/nowhere/at/all", "data.outliers=folder:/nowhere/at/all")
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0
    (line,) = own_lines(error)
    assert "/nowhere/at/all" in line


def test_another_number_of_processes(tmp_path, whole):
    """The state is taken as it is; what follows is equal to rounding where no statistics of a batch come in."""
    options = [*OPTIONS, f"output={tmp_path}", "batch_norm=frozen", "model.dropout=0", "optimizer.lr=0.001"]
    first = load_config(None, [*options, "name=one"])
    threads = torch.get_num_threads()
    expected = train(first, log=silent, report=False)
    (_, lines), _ = processes.run(stopped_and_resumed, 2, [*options, "name=two"], 8)
    said = []
    run = train(load_config(None, [*options, "name=two"]), log=said.append, report=False, resume=True)
    torch.set_num_threads(threads)
    assert any("the run had 2 process(es) and goes on with 1: images, their order" in line for line in said)
    assert not any("the run had" in line for line in lines)
    # Pretraining, of which BatchNorm is not frozen, was by other statistics: from there on the two are compared.
    assert load_checkpoint(run.folder / "last.ckpt")["processes"] == 1
    assert run.method.accuracy == pytest.approx(expected.method.accuracy, abs=0.03)


def stopped_and_resumed(options, step, resume=False):
    """On each process: trains until a step of the method's stage, as if interrupted there; resumes where asked."""
    from oodkern.training.stage import Stage

    lines, advance = [], Stage.advance

    def stop(self):
        if self.kind == "method" and self.step == step:
            raise KeyboardInterrupt
        return advance(self)

    Stage.advance = stop
    config = load_config(None, [*options, "checkpoint_steps=1"])
    with contextlib.suppress(KeyboardInterrupt):
        train(config, log=lines.append, report=False)
    Stage.advance = advance
    if resume:
        train(config, log=lines.append, report=False, resume=True)
    return "resumed", lines


def whole_and_resumed(folder, cases):
    for name, options in cases.items():
        options = [*OPTIONS[1:], "epochs=1", f"output={folder}", *options]
        train(load_config(None, [*options, f"name={name}-whole", "checkpoint_steps=1"]), log=silent, report=False)
        stopped_and_resumed([*options, f"name={name}-stopped"], 4, resume=True)


RESUMED = {
    "fp32": ("precision=fp32", "method=greg"),
    "bf16": ("precision=bf16", "method=edge", "loss.gap_start=0", "accumulate=2"),
    "fp16": ("precision=fp16", "method=gregplus", "loss.sample_every=2"),
    "oal": ("precision=bf16", "method=oal", "loss.contrast=infonce", "loss.draws=20", "loss.rounds=1"),
    "sharded": ("precision=bf16", "method=oal", "parallel=fully_shard", "loss.draws=20", "loss.rounds=1"),
    "head": ("precision=fp32", "head=fused", "parallel_head=true"),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    processes.run(whole_and_resumed, 2, str(folder), RESUMED)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_bit_for_bit(name, resumed):
    check_the_same(resumed / f"{name}-stopped", Whole(resumed / f"{name}-whole"))


def test_what_differs_is_said(digits):
    def said(*overrides, count=1):
        config = load_config(None, ["model.width=4", *overrides])
        from oodkern.methods import METHODS

        method = METHODS[config.method](config.loss, config.multi_label)
        return "\n".join(what_differs(config, method, Processes(0, count), build_classifier(config, digits)))

    assert said() == ""
    assert "accumulate=2: BatchNorm normalises each pass by its own statistics" in said("accumulate=2")
    assert said("accumulate=2", "batch_norm=frozen", "pretrain.epochs=0") == ""
    assert "in pretraining, which batch_norm=frozen is not for, BatchNorm" in said("accumulate=2", "batch_norm=frozen")
    twice = "several passes: the contrast sees the rows of all of them, which are made twice"
    assert twice in said("accumulate=2", "method=oal")
    assert twice not in said("split_forward=true", "method=oal")  # which has no outliers
    assert "the gap sees the rows of all of them" in said("split_forward=true", "method=edge")
    assert "split forward: BatchNorm normalises ID images and outliers" in said("split_forward=true")
    local = said("method=oal", "gather_negatives=false", count=2)
    assert "gather_negatives=false: the contrast sees the rows of one process alone" in local
    assert "gather_negatives" not in said("method=energy", "gather_negatives=false", count=2)
    assert "batch_norm=sync takes those of all" in said(count=2)
    assert "statistics" not in said("batch_norm=frozen", "pretrain.epochs=0", count=2)
    assert "in pretraining, which batch_norm=frozen is not for, each process" in said("batch_norm=frozen", count=2)


def test_what_does_not_go_with_processes():
    def check(*overrides, count=4):
        check_several(load_config(None, overrides), count, CPU)

    check("optimizer.batch_size=4")
    with pytest.raises(
        ConfigError, match=r"optimizer\.batch_size: expected 8 or more, one for each of 2 pass\(es\) of 4"
    ):
        check("optimizer.batch_size=7", "accumulate=2")
    with pytest.raises(ConfigError, match=r"optimizer\.outlier_batch_size: expected 4 or more, .* got 3"):
        check("optimizer.outlier_batch_size=3")
    check("method=oal", "optimizer.outlier_batch_size=3")
    with pytest.raises(ConfigError, match="batch_norm: sync is for GPUs"):
        check("batch_norm=sync")
