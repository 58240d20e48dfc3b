"""Margins from energies, the verb that proposes them, and the warning where they do not fit."""

import json
import re

import pytest
import torch

import oodkern
from oodkern.cli import main
from oodkern.config import ConfigError, load_config
from oodkern.data import build_split
from oodkern.methods import METHODS
from oodkern.methods.energy import auto_margins, violations
from oodkern.report.calibration import calibration_figure
from oodkern.training import train
from oodkern.training.calibration import PUBLISHED, Calibration, calibration_text
from oodkern.training.folder import read_checkpoint

SHORT = ("epochs=1", "pretrain.epochs=2", "model.width=4")


def made(known, outliers):
    known, outliers = torch.tensor(known), torch.tensor(outliers)
    return Calibration(known, outliers, *auto_margins(known, outliers))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of plain training on digits, and one of energy fine-tuning on several digits, each a few seconds."""
    folder = tmp_path_factory.mktemp("runs")
    lines = {}

    def run(*words):
        config = load_config(None, [f"output={folder}", *SHORT, *words])
        lines[config.folder.name] = []
        return train(config, log=lines[config.folder.name].append, report=False)

    return run("method=ce", "name=plain"), run("method=energy", "name=multi", "data.name=digits-multilabel"), lines


def test_violations():
    known, outliers = torch.tensor([-4.0, -3.0, -2.0, -1.0]), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert violations(known, outliers, -3.0, 0.0) == (0.5, 0.4), "what lies on a margin satisfies it"


def test_a_calibration_of_made_energies():
    found = made([-10.0, -8.0, -6.0, -4.0, -2.0], [-3.0, -2.0, -1.0, 0.0, 1.0])
    assert found.separate
    assert (found.margin_in, found.margin_out) == (-8.0, 0.0)
    assert found.auroc == (25 - 1.5) / 25, "of 25 pairs -2 and -3 are in the wrong order, and -2 and -2 tied"
    assert found.margins()["proposed"] == (-8.0, 0.0, 0.6, 0.6)
    assert found.margins()["paper"] == (-25.0, -7.0, 1.0, 0.0)
    assert found.words == "loss.margins=fixed loss.margin_in=-8 loss.margin_out=0"
    text = calibration_text(found, "last", "figure.svg")
    assert re.search(r"^proposed +-8.00 +60% +0.00 +60%$", text, re.MULTILINE)
    assert "do not tell the two apart" not in text


def test_energies_that_do_not_separate():
    found = made([0.0, 1.0, 2.0, 3.0], [-9.0, -8.0, -7.0, -6.0])
    assert not found.separate
    assert found.margin_in < found.margin_out
    assert "do not tell the two apart" in calibration_text(found, "last", "figure.svg")


def test_the_figure_names_the_margins():
    figure = calibration_figure(made([-10.0, -8.0, -6.0], [-3.0, -2.0, -1.0]))
    assert all(word in figure for word in ("margin_in -9", "margin_out -1.5", "held-out images"))


@pytest.mark.parametrize("checkpoint", ["last", "best", "baseline"])
def test_the_verb(runs, checkpoint, capsys):
    plain, _, _ = runs
    assert main(["calibrate", str(plain.folder), "--checkpoint", checkpoint, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    split = build_split(plain.config.data)
    detector = oodkern.load(plain.folder, "last" if checkpoint == "baseline" else checkpoint)
    if checkpoint == "baseline":
        detector.model.load_state_dict(read_checkpoint(plain.folder / "last.ckpt")["baseline"])
    with torch.no_grad():
        known, outliers = (
            oodkern.energy(detector.model(images.images(torch.arange(len(images)))))
            for images in (split.validation, split.outlier_validation)
        )
    assert found["images"] == {"id": 114, "outliers": 54}
    assert (found["margin_in"], found["margin_out"]) == pytest.approx(auto_margins(known, outliers), abs=1e-5)
    for name, pair in PUBLISHED.items():
        row = found["margins"][name]
        assert (row["id_above"], row["outliers_below"]) == violations(known, outliers, *pair)
    assert (plain.folder / "calibration.svg").read_text().startswith("<?xml")
    # What it proposes is taken as it is.
    config = load_config(None, ["method=energy", *found["proposal"].split()])
    assert config.loss.margins == "fixed"
    assert (config.loss.margin_in, config.loss.margin_out) == pytest.approx(auto_margins(known, outliers), rel=1e-3)


def test_the_verb_on_several_labels(runs, tmp_path, capsys):
    _, multi, _ = runs
    assert main(["calibrate", str(multi.folder), "--out", str(tmp_path / "new")]) == 0
    assert "Energies of held-out images by the model of last" in capsys.readouterr().out
    assert (tmp_path / "new" / "calibration.svg").is_file()
    assert main(["calibrate", str(multi.folder), "--json"]) == 0
    quantiles = json.loads(capsys.readouterr().out)["quantiles"]
    assert max(quantiles["id"]) < 0, "minus the JointEnergy is negative"


def test_mistakes(tmp_path, capsys):
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"loss.violation_warning: expected a share from 0 to 1, got 2"):
        load_config(None, ["method=energy", "loss.violation_warning=2"])


def test_what_training_keeps_of_violations(runs):
    """The shares of the held-out images, of the model as it was validated, in the method's stage alone."""
    _, multi, lines = runs
    *_, last = [line for line in multi.history if line["stage"] == "energy"]
    split = build_split(multi.config.data)
    multi.model.eval()
    with torch.no_grad():
        known, outliers = (
            -oodkern.joint_energy(multi.model(images.images(torch.arange(len(images)))))
            for images in (split.validation, split.outlier_validation)
        )
    shares = violations(known, outliers, multi.decided["margin_in"], multi.decided["margin_out"])
    assert (last["validation_above_margin_in"], last["validation_below_margin_out"]) == pytest.approx(shares, abs=0.02)
    assert not any("validation_above_margin_in" in line for line in multi.history if line["stage"] == "pretrain")
    told = any(line.startswith("warning:") for line in lines["multi"])
    assert told == (last["validation_above_margin_in"] > multi.config.loss.violation_warning)


def test_margins_out_of_reach_are_told_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "epochs=2", "method=energy", "loss.margins=fixed", "loss.margin_in=-200", "loss.margin_out=-100"]
    lines = []
    run = train(load_config(None, [*words, "loss.alpha=0.00001"]), log=lines.append, report=False)
    told = [line for line in lines if line.startswith("warning:")]
    assert told == [
        "warning: 100% of the held-out ID images have an energy above margin_in (-200.00), more than "
        f"loss.violation_warning: it is out of reach for this model; `oodkern calibrate {run.folder}` proposes others"
    ]
    lines.clear()
    never = [*words, "loss.alpha=0.00001", "loss.violation_warning=1.0", "name=never"]
    again = train(load_config(None, never), log=lines.append, report=False)
    assert not any(line.startswith("warning:") for line in lines)
    assert torch.equal(again.model.head.weight, run.model.head.weight)


@pytest.mark.parametrize("method", ["energy", "greg", "gregplus"])
def test_methods_with_margins_watch_them(method):
    made = METHODS[method](METHODS[method].Options())
    logits = torch.randn(50, 6)
    watched = made.watch({"margin_in": -2.0, "margin_out": -1.0}, logits, logits)
    energies = oodkern.energy(logits)
    assert watched["validation_above_margin_in"] == pytest.approx(float((energies > -2).double().mean()))
    assert watched["validation_below_margin_out"] == pytest.approx(float((energies < -1).double().mean()))
    assert METHODS["oe"](METHODS["oe"].Options()).watch({}, logits, logits) == {}
