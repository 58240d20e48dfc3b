"""The run itself: what it writes, that it repeats, that it helps, how it stops."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from oodkern import energy
from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet, OODSplit
from oodkern.losses import EnergyLoss
from oodkern.methods import METHODS
from oodkern.metrics import auroc, threshold_at_recall
from oodkern.training import NotFinite, evaluate, load_run, train
from oodkern.training.evaluation import logits_of, plain_score
from oodkern.training.files import load_checkpoint


def silent(line):
    pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = {}
    for method in ("ce", "oe", "energy"):
        config = load_config(None, [f"method={method}", f"output={folder}"])
        lines = []
        done[method] = (train(config, log=lines.append, report=False), lines)
    return done


def test_fine_tuning_finds_the_far_and_keeps_the_accuracy(runs):
    for method in ("oe", "energy"):
        run, _ = runs[method]
        best = run.best_baseline.ood["far"].auroc
        assert run.method.ood["far"].auroc > max(best, 0.98), method
        assert run.method.accuracy > run.baseline[0].accuracy - 0.01, method


def test_baseline_is_the_same_for_every_method(runs):
    accuracies = {method: run.baseline for method, (run, _) in runs.items()}
    first = accuracies.pop("ce")
    assert [one.score_name for one in first] == ["msp", "energy"]
    for other in accuracies.values():
        assert [one.ood for one in other] == [one.ood for one in first]


def test_baseline_is_the_better_of_its_scores(runs):
    run, _ = runs["energy"]
    assert {one.score_name for one in run.baseline} == {"msp", "energy"}
    assert run.best_baseline.mean_auroc == max(one.mean_auroc for one in run.baseline)
    assert run.baseline[0].mean_auroc != run.baseline[1].mean_auroc
    assert run.before.ood == next(one for one in run.baseline if one.score_name == "energy").ood


def test_run_folder(runs):
    run, lines = runs["energy"]
    names = {path.name for path in run.folder.iterdir()}
    assert names - {"tensorboard"} == {
        "config.yaml", "environment.json", "metrics.jsonl", "last.ckpt", "best.ckpt", "scores.npz",
    }  # fmt: skip
    assert load_config(str(run.folder / "config.yaml")) == run.config
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert records == run.history
    epochs = [r for r in records if r["stage"] == "energy" and "epoch" in r]
    assert [r["epoch"] for r in epochs] == list(range(1, 11))
    assert {"loss", "ce", "energy_in", "energy_out", "lr", "images_per_second", "gradient_norm"} <= epochs[0].keys()
    assert epochs[-1]["loss"] == pytest.approx(
        epochs[-1]["ce"] + 0.1 * (epochs[-1]["energy_in"] + epochs[-1]["energy_out"]), rel=1e-4
    )
    assert epochs[-1]["validation_auroc"] > 0.9
    decided = next(r for r in records if r["stage"] == "decided")
    assert decided["margin_in"] < decided["margin_out"]
    assert 0.2 < decided["id_inside"] < 0.3
    assert any("margins (auto)" in line for line in lines)
    results = [(r["model"], r["score"]) for r in records if r["stage"] == "result"]
    assert set(results) == {(m, s) for m in ("baseline", "energy") for s in ("msp", "energy")}
    scores = np.load(run.folder / "scores.npz")
    lengths = {"id": 325, "near": 354, "far": 360}
    assert {name: len(scores[name]) for name in scores} == lengths | {f"baseline/{n}": c for n, c in lengths.items()}


def test_checkpoint_gives_the_scores_again(runs):
    run, _ = runs["energy"]
    detector = load_run(run.folder)
    again = evaluate(detector.model, run.split, "energy", partial(plain_score, "energy"))
    assert again.ood == run.method.ood
    torch.testing.assert_close(again.scores["near"].numpy(), np.load(run.folder / "scores.npz")["near"], rtol=0, atol=0)


def test_best_checkpoint_is_the_epoch_that_validated_best(runs):
    run, _ = runs["oe"]
    detector = load_run(run.folder, "best")
    epochs = [r for r in run.history if r["stage"] == "oe" and "epoch" in r]
    values = [r["validation_accuracy"] + r["validation_auroc"] for r in epochs]
    assert detector.epoch == 1 + values.index(max(values))
    found = evaluate(detector.model, run.split, "msp", partial(plain_score, "msp"))
    assert (found.ood == run.method.ood) == (detector.epoch == 10)


def test_threshold_accepts_95_percent_of_the_validation_images(runs):
    run, _ = runs["energy"]
    scores = energy(logits_of(run.model, run.split.validation))
    assert run.threshold == threshold_at_recall(scores) == load_run(run.folder).threshold
    assert 0.95 <= float((scores <= run.threshold).float().mean()) < 0.97


def test_the_test_images_choose_nothing(short, digits):
    """Whatever they are, threshold, best.ckpt and every logged number of the training stay the same."""
    test = ArraySet(torch.rand(30, 1, 8, 8), torch.arange(30) % 6, digits.classes)
    ood = {"near": ArraySet(torch.rand(20, 1, 8, 8), torch.full((20,), -1))}
    found = []
    for name, split in (("a", digits), ("b", replace(digits, test=test, test_ood=ood))):
        run = train(short(f"name={name}", "epochs=4"), log=silent, report=False, split=split)
        lines = [r for r in run.history if r["stage"] != "result"]
        best = load_checkpoint(run.folder / "best.ckpt")
        for line in lines:
            line.pop("images_per_second", None)
        found.append((lines, run.threshold, best["epoch"], best["model"]["model.fc.weight"].tolist()))
    assert found[0] == found[1]


def test_validation_is_of_the_held_out_images(runs):
    run, _ = runs["energy"]
    last = [r for r in run.history if r["stage"] == "energy" and "epoch" in r][-1]
    known, unknown = (logits_of(run.model, one) for one in (run.split.validation, run.split.outlier_validation))
    assert last["validation_auroc"] == auroc(energy(known), energy(unknown))
    assert last["validation_accuracy"] == float((known.argmax(-1) == run.split.validation.labels).double().mean())


def test_images_are_normalised_by_the_training_images(runs):
    run, _ = runs["energy"]
    images = run.split.train.images(torch.arange(len(run.split.train)))
    assert float(run.model.mean) == pytest.approx(float(images.mean()), rel=1e-4)
    assert float(run.model.std) == pytest.approx(float(images.std()), rel=1e-3)
    normalised = run.model.normalize(images)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-3)


def test_ood_is_strictly_above_the_threshold(runs):
    run, _ = runs["energy"]
    detector = load_run(run.folder)
    images = run.split.test.images(torch.arange(20))
    scores = detector.predict(images).score
    detector.threshold = float(scores[7])
    assert torch.equal(detector.predict(images).is_ood, scores > scores[7])
    assert not detector.predict(images).is_ood[7]
    with pytest.raises(ValueError, match=r"images: expected \[N, 1, 8, 8\], got \[3, 1, 9, 9\]"):
        detector.predict(torch.rand(3, 1, 9, 9))


def test_an_edited_configuration_is_not_the_models(short):
    run = train(short("name=r"), log=silent, report=False)
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("width: 0", "width: 5"))
    with pytest.raises(ConfigError, match="model: not the one of the checkpoint"):
        load_run(run.folder)


def test_a_starting_model_that_is_not_finite(short):
    run = train(short("name=r"), log=silent, report=False)
    state = {key.removeprefix("model."): value * torch.nan for key, value in run.model.state_dict().items()
             if key.startswith("model.") and value.is_floating_point()}  # fmt: skip
    whole = run.model.model.state_dict() | state
    torch.save(whole, run.folder / "nan.pt")
    config = load_config(None, [f"output={run.folder}", "name=s", f"pretrain.checkpoint={run.folder / 'nan.pt'}"])
    assert config.pretrain.epochs == 0
    with pytest.raises(NotFinite, match="the model's logits are not finite before energy begins"):
        train(config, log=silent, report=False)


def test_repeats_bit_for_bit_and_needs_no_report(short):
    results = []
    for name in ("a", "b"):
        run = train(short(f"name={name}", "model.dropout=0.2"), log=silent, report=False)
        results.append(load_checkpoint(run.folder / "last.ckpt")["model"])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    other = train(short("name=c", "model.dropout=0.2", "seed=1"), log=silent, report=False)
    state = other.model.state_dict()
    assert not torch.equal(state["model.fc.weight"], results[0]["model.fc.weight"])


def test_multi_label(short):
    run = train(short("data.name=digits-multilabel", "model.width=8"), log=silent, report=False)
    assert [one.score_name for one in run.baseline] == ["max_logit", "joint_energy"]
    assert run.method.score_name == "joint_energy"
    assert {"bce", "energy_in"} <= next(r for r in run.history if r["stage"] == "energy" and "epoch" in r).keys()
    logits = logits_of(run.model, run.split.test)
    from sklearn.metrics import average_precision_score

    expected = average_precision_score(run.split.test.labels.numpy(), logits.numpy(), average="macro")
    assert run.method.accuracy == pytest.approx(expected)
    prediction = load_run(run.folder).predict(run.split.test.images(torch.arange(5)))
    assert torch.equal(prediction.label, logits[:5] > 0)


def test_images_of_your_own(short):
    generator = torch.Generator().manual_seed(0)

    def part(count, level, labelled):
        images = (torch.rand(count, 1, 8, 8, generator=generator) / 2 + level).clamp(0, 1)
        labels = torch.arange(count) % 2 if labelled else torch.full((count,), -1)
        images[labels == 1, :, :4] = 0
        return ArraySet(images, labels, ("whole", "half"))

    split = OODSplit(
        "mine",
        train=part(200, 0.3, True),
        validation=part(40, 0.3, True),
        test=part(40, 0.3, True),
        outliers=part(100, 0.0, False),
        outlier_validation=part(20, 0.0, False),
        test_ood={"dark": part(50, 0.0, False)},
        classes=("whole", "half"),
    )
    run = train(short(), log=silent, report=False, split=split)
    assert run.method.accuracy > 0.9
    assert set(run.method.ood) == {"dark"}
    asked = train(short("name=f", "data.outlier_augmentation=flip"), log=silent, report=False, split=split)
    assert (asked.split.augmentation, asked.split.outlier_augmentation) == ("none", "flip")
    assert load_run(run.folder).classes == ("whole", "half")
    config = load_config(str(run.folder / "config.yaml"))
    assert config.data.name == "python:mine"
    with pytest.raises(ConfigError, match="the images of python:mine were given by a program"):
        train(config, log=silent, resume=True)
    again = train(short(), log=silent, report=False, split=split, resume=True)
    assert again.method.ood == run.method.ood


def test_not_finite_stops_and_saves_the_batch(short, monkeypatch):
    class Diverging(EnergyLoss):
        def forward(self, *arguments, **options):
            value, parts = super().forward(*arguments, **options)
            return value * torch.nan, parts

    monkeypatch.setattr(METHODS["energy"], "build_loss", lambda self, decided, setting=None: Diverging())
    config = short()
    with pytest.raises(NotFinite, match=r"the loss is nan, at step 1 of energy; the batch is in .*not_finite\.pt"):
        train(config, log=silent)
    saved = load_checkpoint(config.folder / "not_finite.pt")
    assert saved["images"].shape == (64, 1, 8, 8)
    assert saved["outliers"].shape == (128, 1, 8, 8)
    assert saved["target"].shape == (64,)
    state = load_checkpoint(config.folder / "last.ckpt")
    assert state["training"]["step"] == 0, "the model before the step is kept"


def test_a_gradient_that_is_not_finite_stops_before_it_ruins_the_model(short, monkeypatch):
    class Rooted(EnergyLoss):
        def forward(self, *arguments, **options):
            value, parts = super().forward(*arguments, **options)
            return value + (value - value.detach()).sqrt(), parts  # 0, with an infinite slope

    monkeypatch.setattr(METHODS["energy"], "build_loss", lambda self, decided, setting=None: Rooted())
    config = short()
    with pytest.raises(NotFinite, match=r"the gradient's norm is (nan|inf), at step 1 of energy; the batch is in"):
        train(config, log=silent)
    state = load_checkpoint(config.folder / "last.ckpt")["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_nothing_is_overwritten_unasked(short):
    config = short("name=r")
    train(config, log=silent, report=False)
    before = (config.folder / "last.ckpt").read_bytes()
    with pytest.raises(ConfigError, match=r"r holds a run \(epoch 2 of energy\): --resume goes on .* --overwrite"):
        train(config, log=silent, report=False)
    assert (config.folder / "last.ckpt").read_bytes() == before
    (config.folder / "report.html").write_text("of before")
    train(short("name=r", "seed=1", "epochs=1"), log=silent, report=False, overwrite=True)
    assert not (config.folder / "report.html").exists()
    assert load_run(config.folder).config.seed == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(short, precision):
    """The same run there: it learns, its checkpoint is judged the same on the CPU, and it can be resumed."""
    config = short(f"precision={precision}", "device=cuda", "data.workers=2", "epochs=8", "pretrain.epochs=15")
    run = train(config, log=silent)
    assert next(run.model.parameters()).is_cuda
    assert run.method.accuracy > 0.95
    assert run.method.ood["far"].auroc > 0.95
    detector = load_run(run.folder)
    again = evaluate(detector.model, run.split, "energy", partial(plain_score, "energy"))
    torch.testing.assert_close(again.scores["near"], run.method.scores["near"], rtol=1e-2, atol=1e-2)
    images = run.split.test.images(torch.arange(20))
    there, here = load_run(run.folder, device="auto").predict(images), detector.predict(images)
    assert not there.score.is_cuda, "predictions are where the images were"
    torch.testing.assert_close(there[:2], here[:2], rtol=1e-2, atol=1e-2)
    resumed = train(config, log=silent, resume=True, report=False)
    assert resumed.method.ood == run.method.ood
