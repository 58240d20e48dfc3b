"""The run itself: what it writes, that it repeats, that it helps, how it stops."""

import json

import numpy as np
import pytest
import torch

from oodkern import energy
from oodkern.config import load_config
from oodkern.data import load_digits
from oodkern.losses import EnergyLoss
from oodkern.methods import METHODS, as_score
from oodkern.methods.energy import EnergyOptions, auto_margins
from oodkern.models import SmallCNN
from oodkern.training import NotFinite, evaluate, train
from oodkern.training import trainer as trainer_module
from oodkern.training.files import load_checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = {}
    for method in METHODS:
        config = load_config(None, [f"method={method}", f"output={folder}"])
        lines = []
        done[method] = (train(config, log=lines.append), lines)
    return done


def test_fine_tuning_finds_the_far_and_keeps_the_accuracy(runs):
    for method in ("oe", "energy"):
        run, _ = runs[method]
        best = max(one.ood["far"].auroc for one in run.baseline)
        assert run.method.ood["far"].auroc > max(best, 0.98), method
        assert run.method.accuracy > run.baseline[0].accuracy - 0.01, method


def test_baseline_is_the_same_for_every_method(runs):
    accuracies = {method: run.baseline for method, (run, _) in runs.items()}
    first = accuracies.pop("ce")
    for other in accuracies.values():
        assert [one.ood for one in other] == [one.ood for one in first]


def test_run_folder(runs):
    run, lines = runs["energy"]
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "last.ckpt", "scores.npz"}
    assert load_config(str(run.folder / "config.yaml")).method == "energy"
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["stage"] == "energy" and "epoch" in r] == list(range(1, 11))
    assert {"ce", "energy_in", "energy_out"} <= records[-5].keys()
    decided = next(r for r in records if r["stage"] == "decided")
    assert decided["margin_in"] < decided["margin_out"]
    assert 0.2 < decided["id_inside"] < 0.3
    assert any("margins (auto)" in line for line in lines)
    scores = np.load(run.folder / "scores.npz")
    assert {name: len(scores[name]) for name in scores} == {"id": 325, "near": 354, "far": 360}


def test_checkpoint_gives_the_scores_again(runs):
    run, _ = runs["energy"]
    model = SmallCNN(1, 6, 32)
    model.load_state_dict(load_checkpoint(run.folder / "last.ckpt")["model"])
    again = evaluate(model, run.split, "energy", energy)
    assert again.ood == run.method.ood
    torch.testing.assert_close(again.scores["near"].numpy(), np.load(run.folder / "scores.npz")["near"], rtol=0, atol=0)


def test_repeats_bit_for_bit(tmp_path):
    results = []
    for name in ("a", "b"):
        config = load_config(None, [f"output={tmp_path}", f"name={name}", "epochs=2", "pretrain.epochs=2"])
        run = train(config, log=lambda line: None)
        results.append(load_checkpoint(run.folder / "last.ckpt")["model"])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_not_finite_stops_and_saves_the_batch(tmp_path, monkeypatch):
    class Diverging(EnergyLoss):
        def forward(self, *arguments, **options):
            value, parts = super().forward(*arguments, **options)
            return value * torch.nan, parts

    monkeypatch.setattr(METHODS["energy"], "make_loss", lambda self, **decided: Diverging(**decided))
    config = load_config(None, [f"output={tmp_path}", "pretrain.epochs=1"])
    with pytest.raises(NotFinite, match=r"the loss is nan at step 1 of energy; the batch is in .*not_finite\.pt"):
        train(config, log=lambda line: None)
    saved = load_checkpoint(config.folder / "not_finite.pt")
    assert saved["images"].shape == (192, 1, 8, 8)
    assert (saved["target"] < 0).sum() == 128


def test_no_half_written_file(tmp_path, monkeypatch):
    """A write that dies leaves the file of before."""
    target = tmp_path / "last.ckpt"
    trainer_module.files.save_checkpoint(target, {"model": torch.ones(3)})
    monkeypatch.setattr(trainer_module.files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        trainer_module.files.save_checkpoint(target, {"model": torch.zeros(3)})
    assert torch.equal(load_checkpoint(target)["model"], torch.ones(3))


def test_evaluation_restores_the_mode():
    model, split = SmallCNN(1, 6, 4), load_digits(0)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, split, "energy", energy)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_scores_are_larger_for_ood():
    sure, unsure = torch.tensor([[12.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.2]])
    for name in ("energy", "msp"):
        assert as_score(name, sure) < as_score(name, unsure)
    torch.testing.assert_close(as_score("msp", unsure), -unsure.softmax(-1).amax(-1))
    with pytest.raises(ValueError, match="expected 'energy' or 'msp'"):
        as_score("entropy", sure)


def test_auto_margins():
    ids, outliers = torch.linspace(-12, -8, 101), torch.linspace(-6, -2, 101)
    assert auto_margins(ids, outliers) == pytest.approx((-11.0, -3.0))
    margin_in, margin_out = auto_margins(outliers, ids - 5)  # a model that has them the wrong way round
    assert margin_in < margin_out
    constant = torch.full((9,), -3.0)
    margin_in, margin_out = auto_margins(constant, constant)
    assert margin_in < margin_out


def test_the_temperature_reaches_margins_and_score():
    """Margins that are quantiles of other energies than the loss's would hold for none of them."""
    method = METHODS["energy"](EnergyOptions(temperature=4.0))
    ids, outliers = torch.randn(400, 6) * 4, torch.randn(300, 6)
    loss, decided = method.build_loss(ids, outliers)
    assert loss.temperature == 4.0
    assert decided["id_inside"] == pytest.approx(0.25, abs=0.01)
    assert decided["outliers_inside"] == pytest.approx(0.25, abs=0.01)
    _, parts = loss(ids, torch.zeros(400, dtype=torch.int64), outliers, return_parts=True)
    hinge = (energy(ids, 4.0) - decided["margin_in"]).relu().square().mean()
    torch.testing.assert_close(parts["energy_in"], hinge)
    torch.testing.assert_close(method.score(ids), energy(ids, 4.0))


def test_small_cnn():
    model = SmallCNN(3, 5, width=6)
    images = torch.randn(2, 3, 11, 9)
    assert model(images).shape == (2, 5)
    assert model.features(images).shape == (2, 12)
    torch.testing.assert_close(model.fc(model.features(images)), model(images))
    with pytest.raises(ValueError, match="num_classes: expected a positive integer, got 0"):
        SmallCNN(num_classes=0)
