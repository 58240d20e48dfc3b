"""A run with a pool that is stopped anywhere goes on bit for bit; with other features it does not go on."""

import shutil

import pytest
import torch
from training.test_pool import CLUSTERS, FEW, starting
from training.test_resume import check_the_same, same, silent

from oodkern.config import ConfigError
from oodkern.pools.extraction import extract
from oodkern.training import train
from oodkern.training.files import load_checkpoint
from oodkern.training.plan import plan
from oodkern.training.stage import Stage

CASES = {
    "epoch": ("outliers.refresh=epoch",),
    "step": ("outliers.refresh=1", "outliers.policy=poem"),
    "anew": ("outliers.refresh=4", "outliers.extract_every=1"),
    "anew-poem": ("outliers.refresh=3", "outliers.extract_every=1", "outliers.policy=poem"),
    "auto": ("outliers.pool=auto", "outliers.policy=dos", "outliers.refresh=7"),
    "rounds": ("method=gregplus", "loss.sample_every=3", "loss.clusters=4", "outliers.refresh=2"),
    "workers": ("outliers.refresh=4", "data.workers=1", "outliers.policy=uniform"),
}


@pytest.fixture
def options(short, digits, tmp_path):
    folder = tmp_path / "pool"
    extract(starting(short(*FEW), digits), digits.outliers, folder)
    return (*FEW, f"outliers.pool={folder}", CLUSTERS, "outliers.count=40", "epochs=2", "model.dropout=0.2")


def stopped(monkeypatch, config, at):
    """Trains until a step of the method's stage, and stops there as if killed after the last checkpoint."""
    advance = Stage.advance

    def stop(self):
        if self.kind == "method" and self.step == at:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Stage, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, log=silent, report=False)
    monkeypatch.setattr(Stage, "advance", advance)


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_is_bit_for_bit_the_same(short, options, monkeypatch, name):
    options = (*options, *CASES[name])
    whole = train(short(*options, "name=whole", "checkpoint_steps=3"), log=silent, report=False)
    # Ten steps are an epoch: the checkpoint is before any choice, or within an epoch, perhaps with new features.
    for at in (17,) if name in ("rounds", "workers") else (2, 17):
        config = short(*options, f"name=stopped{at}", "checkpoint_steps=3")
        stopped(monkeypatch, config, at)
        before = load_checkpoint(config.folder / "last.ckpt")["training"]
        assert before["step"] == at - at % 3
        run = train(config, log=silent, report=False, resume=True)
        check_the_same(run.folder, whole)
    assert before["pool"]["rows"].shape == (40,)


def test_features_that_are_gone_or_others(short, options, monkeypatch, digits, tmp_path):
    config = short(*options, "name=r")
    stopped(monkeypatch, config, 12)
    pool, kept = tmp_path / "pool", tmp_path / "kept"
    pool.rename(kept)
    with pytest.raises(ConfigError, match=r"outliers\.pool: .*pool"):
        train(config, log=silent, report=False, resume=True)
    extract(starting(short(*FEW, "seed=9"), digits), digits.outliers, pool)
    with pytest.raises(
        ConfigError, match=r"outliers\.pool: the run in .*r has features .* of the model \w{12}, .*, got "
    ):
        train(config, log=silent, report=False, resume=True)
    shutil.rmtree(pool)
    extract(starting(short(*FEW), digits), digits.outliers.select(torch.arange(50, 100)), pool)
    with pytest.raises(ConfigError, match=r"has features \[\d+, 8\] .* got \[50, 8\] of"):
        train(config, log=silent, report=False, resume=True)
    shutil.rmtree(pool)
    extract(starting(short(*FEW), digits), digits.outliers, pool, dtype="bfloat16")  # of the same model and size
    with pytest.raises(ConfigError, match=r"has features (\[306, 8\] of the model \w{12}), .* got \1, SHA-256"):
        train(config, log=silent, report=False, resume=True)
    shutil.rmtree(pool)
    kept.rename(pool)
    train(config, log=silent, report=False, resume=True)


def test_own_features_that_are_gone(short, options, monkeypatch):
    config = short(*options, "outliers.pool=auto", "outliers.extract_every=1", "name=r")
    stopped(monkeypatch, config, 15)
    shutil.rmtree(config.folder / "pool" / "epoch-0")
    with pytest.raises(ConfigError, match=r"outliers\.pool: the run goes on with features that are gone: .*epoch-0"):
        train(config, log=silent, report=False, resume=True)


def test_without_a_pool_nothing_of_it_is_kept(short):
    run = train(short(*FEW, "name=r", "epochs=1"), log=silent, report=False)
    assert "pool" not in load_checkpoint(run.folder / "last.ckpt")["training"]
    assert not (run.folder / "pool").exists()


def test_pretraining_is_shared_with_runs_without_a_pool(short, tmp_path):
    """What outliers are chosen by comes after it."""
    options, pretrained = (*FEW, "pretrain.epochs=1", "epochs=0"), tmp_path / "pretrained.pt"
    train(short(*options, "name=a"), silent, report=False, pretrained=pretrained)
    before = pretrained.stat().st_mtime_ns
    run = train(short(*options, "name=b", "outliers.pool=auto"), silent, report=False, pretrained=pretrained)
    assert pretrained.stat().st_mtime_ns == before
    assert same(*(load_checkpoint(run.folder.parent / name / "last.ckpt")["model"] for name in "ab"))


def test_a_plan_is_of_a_step_whatever_chooses_its_outliers(short):
    options = ("method=energy", "model.width=4", "compile=none")
    alone, with_pool = (plan(short(*options, *more)) for more in ((), ("outliers.pool=/nowhere", "outliers.refresh=1")))
    assert with_pool.configured.peak == alone.configured.peak
