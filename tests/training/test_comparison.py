"""Paired differences: the statistics, and the runs behind them."""

import json
import shutil

import numpy as np
import pytest
from scipy import stats

from oodkern.config import ConfigError, load_config
from oodkern.training import train
from oodkern.training.comparison import BASELINE, Comparison, compare, paired
from oodkern.training.files import load_checkpoint

SHORT = ("epochs=1", "pretrain.epochs=1", "model.width=4")


def test_the_interval_is_students():
    generator = np.random.default_rng(0)
    base = generator.random(12)
    values = base + generator.normal(0.02, 0.05, 12)
    found = paired(values.tolist(), base.tolist(), list(range(12)))
    known = stats.ttest_rel(values, base).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.mean == pytest.approx((values - base).mean())
    assert found.better == int((values > base).sum())
    assert found.units == 12
    assert paired(values.tolist(), base.tolist(), list(range(12)), more=False).better == 12 - found.better


def test_seeds_of_one_split_are_one_unit():
    """Three seeds of two splits are two units, not six."""
    values, base = [0.1, 0.2, 0.3, 0.5, 0.5, 0.5], [0.0] * 6
    found = paired(values, base, [0, 0, 0, 1, 1, 1])
    assert found.units == 2
    half = stats.t.ppf(0.975, 1) * 0.15
    assert (found.low, found.high) == pytest.approx((0.35 - half, 0.35 + half))


def test_one_unit_has_no_interval():
    found = paired([0.5], [0.2], [0])
    assert (found.mean, found.low, found.high) == (pytest.approx(0.3), None, None)


def fake(method, split, accuracy, **by_score):
    def metrics(auroc):
        return {"auroc": auroc, "aupr_out": auroc, "fpr95_ood_positive": 1 - auroc, "fpr95_id_positive": 1 - auroc}

    return {
        "method": method,
        "split": split,
        "seed": 0,
        "accuracy": accuracy,
        "by_score": {name: {"near": metrics(value)} for name, value in by_score.items()},
    }


def test_ce_is_judged_by_the_score_that_serves_it_better():
    found = Comparison(["ce", "energy"], [0, 1], [0])
    found.runs = [
        fake("ce", 0, 0.9, msp=0.9, energy=0.6),
        fake("energy", 0, 0.8, energy=0.95),
        fake("ce", 1, 0.9, msp=0.7, energy=0.8),
        fake("energy", 1, 0.9, energy=0.75),
    ]
    assert found.score_of(BASELINE, "near") == "msp"  # 0.8 in the mean, against 0.7
    rows = {(row["method"], row["metric"]): row for row in found.summary()}
    assert rows["energy", "auroc"]["difference"]["mean"] == pytest.approx(0.05)
    assert rows["energy", "auroc"]["difference"]["better"] == 2
    assert rows["energy", "fpr95_ood_positive"]["difference"]["mean"] == pytest.approx(-0.05)
    assert rows["energy", "fpr95_ood_positive"]["difference"]["better"] == 2
    assert rows["energy", "accuracy"]["difference"]["mean"] == pytest.approx(-0.05)
    assert rows["energy", "accuracy"]["difference"]["better"] == 0
    assert rows["ce", "auroc"]["difference"] is None
    lines = found.table().splitlines()
    energy = next(line for line in lines if line.startswith("energy") and "AUROC" in line)
    assert energy.split()[:4] == ["energy", "energy", "near", "AUROC"]
    assert "85.0" in energy
    assert "+5.0" in energy
    assert "2 of 2" in energy
    assert max(map(len, lines)) <= 110


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("compare"), []
    found = compare(["energy"], [0], [0, 1], [*SHORT, f"output={folder}"], log=lines.append)
    return folder, found, lines


def test_every_method_runs_on_every_split(compared):
    folder, found, lines = compared
    names = {f"{method}-split{split}-seed0" for method in ("ce", "energy") for split in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {*names, "pretrained"}
    assert [(run["method"], run["split"]) for run in found.runs] == [("ce", 0), ("energy", 0), ("ce", 1), ("energy", 1)]
    assert lines[0].startswith("1 of 4: ce-split0-seed0: AUROC near ")
    # From the same starting model.
    for split in (0, 1):
        ce, energy = (load_checkpoint(folder / f"{m}-split{split}-seed0" / "last.ckpt") for m in ("ce", "energy"))
        assert all((ce["baseline"][key] == energy["baseline"][key]).all() for key in ce["baseline"])


def test_numbers_are_those_of_the_runs(compared):
    folder, found, _ = compared
    config = load_config(None, [*SHORT, f"output={folder}", "method=energy", "data.split=1"])
    run = train(config, log=lambda line: None, resume=True, report=False)
    recorded = next(one for one in found.runs if one["method"] == "energy" and one["split"] == 1)
    assert recorded["by_score"]["energy"]["near"] == run.method.ood["near"].as_dict()
    assert recorded["accuracy"] == run.method.accuracy
    assert json.loads(json.dumps(found.as_dict("oodkern compare")))["splits"] == [0, 1]


def test_a_comparison_that_was_stopped_goes_on(compared):
    folder, found, _ = compared
    shutil.rmtree(folder / "energy-split1-seed0")
    written = (folder / "ce-split0-seed0" / "last.ckpt").stat().st_mtime_ns
    again = compare(["energy"], [0], [0, 1], [*SHORT, f"output={folder}"], log=lambda line: None)
    assert again.runs == found.runs
    assert (folder / "ce-split0-seed0" / "last.ckpt").stat().st_mtime_ns == written, "trained again"


def test_where_the_runs_go(tmp_path, monkeypatch):
    """Where output= or the file says, the default's name included; and a seed that is named twice is one."""
    seen = []
    monkeypatch.setattr("oodkern.training.comparison.train", lambda config, **options: seen.append(config) or 1 / 0)
    file = tmp_path / "c.yaml"
    file.write_text("output: runs\n")
    for path, overrides, expected in (
        (None, [], "runs/compare"),
        (None, ["output=runs"], "runs"),
        (None, ["output=/tmp/x"], "/tmp/x"),
        (str(file), [], "runs"),
    ):
        with pytest.raises(ZeroDivisionError):
            compare(["energy"], [0, 0], [None], overrides, path)
        assert seen[-1].output == expected


def test_seeds_that_are_named_twice(compared):
    folder, found, _ = compared
    again = compare(["energy", "energy"], [0, 0], [0, 1], [*SHORT, f"output={folder}"], log=lambda line: None)
    assert again.runs == found.runs
    assert again.seeds == [0]


def test_mistakes_come_before_the_first_run(tmp_path):
    for overrides, message in (
        ([f"output={tmp_path}", "seed=3"], "seed: compare sets it for each run"),
        ([f"output={tmp_path}", "name=x"], "name: compare sets it"),
        ([f"output={tmp_path}", "optimizer.lr=-1"], "optimizer.lr: expected a positive number"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(["energy"], [0], [None], overrides)
    with pytest.raises(ConfigError, match=r"method: expected one of ce, oe, energy, edge, .*, got 'energi'"):
        compare(["energi"], [0], [None], [f"output={tmp_path}"])
    assert not list(tmp_path.iterdir())
