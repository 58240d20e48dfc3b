"""Margins of a run: which methods watch theirs, also after a resumption, and what `calibrate` makes of such runs."""

import json

import pytest
import torch
from picture_run import train_on, write_pictures

from oodkern.cli import main
from oodkern.config import ConfigError, load_config
from oodkern.methods import METHODS, as_score
from oodkern.methods.energy import auto_margins, violations
from oodkern.training import train
from oodkern.training.calibration import Calibration
from oodkern.training.evaluation import logits_of
from oodkern.training.files import load_checkpoint, save_checkpoint
from oodkern.training.trainer import Trainer

SMALL = ("model.width=4", "pretrain.epochs=1", "epochs=2")
FAR_OFF = ("loss.margins=fixed", "loss.margin_in=-200", "loss.margin_out=-100", "loss.alpha=0.00001")
SHARES = {"validation_above_margin_in", "validation_below_margin_out"}
TIMED = ("images_per_second", "seconds")


def made(known, outliers, temperature=1.0):
    return Calibration(known, outliers, *auto_margins(known, outliers), temperature)


def record(run):
    return [{key: value for key, value in line.items() if key not in TIMED} for line in run.history]


def silent(line):
    pass


def test_separation_watches_the_energy_where_it_has_one(tmp_path):
    """By the energies of the run's model, though its score is another one."""
    words = (f"output={tmp_path}", *SMALL, "method=separation")
    plain = train(load_config(None, [*words, "name=oe"]), log=silent, report=False)
    assert not any(SHARES & line.keys() for line in plain.history)
    run = train(load_config(None, [*words, "name=e", "loss.outlier_loss=energy"]), log=silent, report=False)
    *_, last = [line for line in run.history if line["stage"] == "separation"]
    sides = (
        as_score("energy", logits_of(run.model, part)) for part in (run.split.validation, run.split.outlier_validation)
    )
    shares = violations(*sides, run.decided["margin_in"], run.decided["margin_out"])
    assert (last["validation_above_margin_in"], last["validation_below_margin_out"]) == shares


def test_separation_warns_as_the_energy_does():
    options = METHODS["separation"].Options
    with pytest.raises(ValueError, match=r"loss.violation_warning: counts with loss.outlier_loss=energy alone"):
        METHODS["separation"](options(violation_warning=0.5))
    with pytest.raises(ValueError, match=r"loss.violation_warning: expected a share from 0 to 1, got -1"):
        METHODS["separation"](options(outlier_loss="energy", violation_warning=-1))
    method = METHODS["separation"](options(outlier_loss="energy", violation_warning=0.5))
    margins = {"margin_in": -9.0, "margin_out": -1.0}
    watched = {"validation_above_margin_in": 0.5, "validation_below_margin_out": 1.0}
    assert method.warning(margins, watched) == "", "a share that is reached is not exceeded"
    assert "51% of the held-out ID images have an energy above margin_in (-9.00)" in method.warning(
        margins, {**watched, "validation_above_margin_in": 0.51}
    )


@pytest.mark.parametrize("labels", ["digits", "digits-multilabel"])
def test_a_resumed_run_warns_and_logs_as_the_whole_one(tmp_path, monkeypatch, labels):
    words = (f"output={tmp_path}", *SMALL, "method=energy", f"data.name={labels}", *FAR_OFF)
    said, again = [], []
    whole = train(load_config(None, [*words, "name=whole"]), log=said.append, report=False)
    save = Trainer.save

    def save_and_die(self, stage):
        save(self, stage)
        if stage.kind == "method" and stage.epoch == 1:
            raise KeyboardInterrupt

    cut = load_config(None, [*words, "name=cut"])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(cut, log=again.append, report=False)
    assert not any(line.startswith("warning:") for line in again), "it has not ended"
    # As a run has it that was begun before there was the key.
    kept = cut.folder / "config.yaml"
    lines = kept.read_text().splitlines(keepends=True)
    assert sum("violation_warning" in line for line in lines) == 1
    kept.write_text("".join(line for line in lines if "violation_warning" not in line))
    resumed = train(cut, log=again.append, report=False, resume=True)
    assert record(resumed) == record(whole)
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)
    warned = [[line.replace(name, "") for line in lines if line.startswith("warning:")]
              for name, lines in (("whole", said), ("cut", again))]  # fmt: skip
    assert warned[0] == warned[1]
    assert len(warned[0]) == 1


def test_large_and_close_margins_are_proposed_apart():
    """Energies of many classes: to four digits both would be one number, which no loss takes."""
    for centre, deviation in ((-1234.5, 0.05), (-2.3026, 1e-4)):
        energies = centre + deviation * torch.randn(2, 400)
        found = made(energies[0], energies[1] + 4 * deviation)
        loss = load_config(None, ["method=energy", *found.words.split()]).loss
        distance = found.margin_out - found.margin_in
        assert loss.margin_in == pytest.approx(found.margin_in, abs=0.01 * distance)
        assert loss.margin_out == pytest.approx(found.margin_out, abs=0.01 * distance)


def test_a_temperature_is_part_of_the_proposal(tmp_path, capsys):
    """Of methods whose temperature is the energy's; that of OAL's distillation is another one."""
    assert "temperature" not in made(torch.arange(-9.0, -4.0), torch.arange(5.0)).words
    words = (f"output={tmp_path}", "model.width=4", "pretrain.epochs=1", "epochs=0", "loss.temperature=4")
    proposals = {}
    for method in ("energy", "oal"):
        run = train(load_config(None, [*words, f"method={method}", f"name={method}"]), log=silent, report=False)
        assert main(["calibrate", str(run.folder), "--checkpoint", "baseline", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        at = 4.0 if method == "energy" else 1.0
        sides = (
            as_score("energy", logits_of(run.model, part), at)
            for part in (run.split.validation, run.split.outlier_validation)
        )
        assert (found["margin_in"], found["margin_out"]) == pytest.approx(auto_margins(*sides), abs=1e-5)
        assert found["temperature"] == at
        proposals[method] = found["proposal"]
    assert proposals["energy"].endswith(" loss.temperature=4")
    assert "temperature" not in proposals["oal"]


def test_the_starting_model_of_a_run_that_stopped_within_an_epoch(tmp_path, capsys):
    config = load_config(None, [f"output={tmp_path}", *SMALL, "epochs=1", "method=energy", "name=run"])
    folder = train(config, log=silent, report=False).folder
    asked = ["calibrate", str(folder), "--checkpoint", "baseline", "--json"]
    assert main(asked) == 0
    before = json.loads(capsys.readouterr().out)
    state = load_checkpoint(folder / "last.ckpt")
    save_checkpoint(folder / "last.ckpt", {**state, "threshold": float("nan")})
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out) == before
    save_checkpoint(folder / "last.ckpt", {**state, "baseline": None})
    assert main(asked) == 2
    assert "has no starting model yet; expected last" in capsys.readouterr().err


def test_an_unreadable_image_is_left_out_and_named(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    run = train_on(write_pictures(tmp_path / "pictures"), tmp_path)
    damaged = run.split.validation.paths[0]
    damaged.write_bytes(b"no image")
    assert main(["calibrate", str(run.folder), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["images"]["id"] == len(run.split.validation) - 1
    assert f"oodkern calibrate: left out, {damaged}" in told.err


def test_a_share_is_checked_before_a_run():
    with pytest.raises(ConfigError, match=r"loss.violation_warning: expected a share from 0 to 1, got 1.5"):
        load_config(None, ["method=greg", "loss.violation_warning=1.5"])
