"""Every method in the trainer: it learns, is judged, is resumed bit for bit, and says what its options lack."""

import json

import numpy as np
import pytest
import torch
from stages import DRAWN, smooth, split_of, stage_of
from test_resume import check_the_same

from oodkern.cli import main
from oodkern.config import ConfigError, load_config
from oodkern.methods import METHODS
from oodkern.training import evaluate, load_run, train
from oodkern.training.files import load_checkpoint
from oodkern.training.stage import Stage

# What makes a method's run short.
OPTIONS = {name: () for name in METHODS} | {"gregplus": ("loss.clusters=8",), "oal": DRAWN}
SHORT = ("epochs=1", "pretrain.epochs=1", "model.width=4", "data.limit=320")


def silent(line):
    pass


def config_of(folder, method, *overrides):
    return load_config(None, [f"method={method}", f"output={folder}", *SHORT, *OPTIONS[method], *overrides])


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_from_training_to_report(tmp_path, method, capsys):
    words = [f"method={method}", f"output={tmp_path}", "name=r", *SHORT, *OPTIONS[method]]
    assert main(["train", *words, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert any(line.startswith(f"{method} ") for line in printed.splitlines())
    folder = tmp_path / "r"
    assert "<html" in (folder / "report.html").read_text()[:200]
    scores = np.load(folder / "scores.npz")

    detector = load_run(folder)
    name = detector.method.score_name
    run_split = split_of(detector.config.data.name)
    again = evaluate(detector.model, run_split, name, detector.method.score)
    for one in ("id", *again.ood):
        np.testing.assert_array_equal(again.scores[one].numpy(), scores[one])
    images = run_split.test.images(torch.arange(40))
    prediction = detector.predict(images)
    torch.testing.assert_close(prediction.score, again.scores["id"][:40], rtol=1e-4, atol=1e-5)
    assert torch.equal(prediction.is_ood, prediction.score > detector.threshold)
    outside = run_split.validation.images(torch.arange(len(run_split.validation)))
    assert 0.94 < float((~detector.predict(outside).is_ood).float().mean()) < 0.99

    assert main(["evaluate", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score"] == name
    assert found["ood"] == {one: metrics.as_dict() for one, metrics in again.ood.items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = [line["ood"] for line in lines if line["stage"] == "result" and line["model"] == method]
    assert found["ood"] in results


@pytest.mark.parametrize("method", list(METHODS))
def test_more_epochs_learn(tmp_path, method):
    """The classes stay known, and validation outliers are told better than by chance."""
    longer = ("epochs=4", "pretrain.epochs=8", "model.width=8", "data.limit=640", "optimizer.batch_size=32")
    run = train(config_of(tmp_path, method, *longer), log=silent, report=False)
    assert run.method.accuracy > (0.5 if run.split.multi_label else 0.93)
    last = [line for line in run.history if line["stage"] == method and "epoch" in line][-1]
    assert last["validation_auroc"] > 0.75


RESUMED = {
    "oe": ("oe", ()),
    "edge, before the gap": ("edge", ("loss.gap_start=0.5", "stop=3")),
    "edge, at the gap": ("edge", ("loss.gap_start=0.5", "stop=4")),
    "edge, after the gap": ("edge", ("loss.gap_start=0.5", "loss.tail=frequency", "stop=6")),
    "greg": ("greg", ()),
    "greg, fused and split": ("greg", ("head=fused", "split_forward=true")),
    "gregplus": ("gregplus", ()),
    "gregplus, first of a round": ("gregplus", ("loss.sample_every=3", "epochs=2", "stop=3")),
    "gregplus, in a round": ("gregplus", ("loss.sample_every=3", "epochs=2", "stop=5")),
    "gregplus, in a round, of an older checkpoint": (
        "gregplus",
        ("loss.sample_every=3", "epochs=2", "stop=6", "checkpoint_steps=5"),
    ),
    "gregplus, before the first step": ("gregplus", ("loss.sample_every=3", "stop=0")),
    "separation": ("separation", ("loss.start=0.5",)),
    "separation, before stage two": ("separation", ("loss.start=0.5", "stop=1")),
    "separation, projection": (
        "separation",
        ("loss.separation=projection", "loss.refresh=3", "epochs=2", "stop=4", "optimizer.lr=0.1"),
    ),
    "separation, energy": ("separation", ("loss.outlier_loss=energy", "loss.weight=0.1", "head=fused")),
    "oal": ("oal", ()),
    "oal, mlp and mle": ("oal", ("loss.transfer=mlp", "loss.club_mode=mle", "loss.teacher_outputs=online")),
    "oal, infonce": ("oal", ("loss.contrast=infonce", "loss.transfer=mlp")),
    "oal, adamw": ("oal", ("optimizer.name=adamw", "data.augmentation=crop")),
    "oal, fp16": ("oal", ("precision=fp16",)),
    "greg, bf16": ("greg", ("precision=bf16",)),
}


def check_resuming(tmp_path, monkeypatch, method, options):
    stop = next((int(one[5:]) for one in options if one.startswith("stop=")), 2)
    options = [one for one in options if not one.startswith("stop=")]
    # A step after the checkpoint is lost, and made again; dropout and augmentation draw their numbers.
    options = ["checkpoint_steps=1", "model.dropout=0.2", "data.augmentation=crop", *options]
    whole = train(config_of(tmp_path, method, "name=whole", *options), log=silent, report=False)
    advance = Stage.advance

    def stopping(self):
        if self.kind == "method" and self.step == stop:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Stage, "advance", stopping)
    config = config_of(tmp_path, method, "name=stopped", *options)
    with pytest.raises(KeyboardInterrupt):
        train(config, log=silent, report=False)
    state = load_checkpoint(config.folder / "last.ckpt")
    assert state["stage"] == method
    assert state["training"]["step"] == stop // config.checkpoint_steps * config.checkpoint_steps
    assert stop < 4 * config.epochs or method == "edge", "stopped too late to show anything"
    monkeypatch.setattr(Stage, "advance", advance)
    resumed = train(config, log=silent, report=False, resume=True)
    check_the_same(resumed.folder, whole)


@pytest.mark.parametrize("case", list(RESUMED))
def test_resuming_is_bit_for_bit_the_same(tmp_path, monkeypatch, case):
    check_resuming(tmp_path, monkeypatch, *RESUMED[case])


def test_the_state_holds_what_the_next_step_depends_on():
    """Of the loss's networks, prototypes and basis, and of a round of candidates."""
    for overrides, keys in (
        (("oal", *DRAWN, "loss.transfer=mlp"), {"transfer.linear.weight", "conditionals.0.mean.0.weight"}),
        (("oal", *DRAWN, "loss.contrast=infonce"), {"prototypes"}),
        (("separation", "loss.separation=projection"), {"_extra_state"}),
    ):
        stage = stage_of(*overrides)
        stage.advance()
        assert keys <= stage.state_dict()["loss"].keys()
    stage = stage_of("gregplus", "loss.sample_every=2", "loss.clusters=8")
    stage.advance()
    kept = stage.state_dict()["round"]
    assert (len(kept["features"]), int((~kept["available"]).sum())) == (768, 128)
    assert stage_of("gregplus", "loss.clusters=8").state_dict()["round"] is None


CASES = {
    "edge": ("loss.gap_start=0.5",),
    "greg": (),
    "greg fused": ("head=fused",),
    "gregplus": ("loss.clusters=8",),
    "separation": (),
    "separation fused": ("head=fused", "loss.separation=projection", "loss.refresh=2"),
    "oal": DRAWN,
    "oal infonce": (*DRAWN, "loss.contrast=infonce", "loss.transfer=mlp"),
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", list(CASES))
def test_in_16_bits(case, precision):
    """Losses are near those of float32, finite, and fall."""
    method = case.split()[0]
    found = {}
    for kind in ("fp32", precision):
        stage = stage_of(
            method, f"precision={kind}", "epochs=4", "optimizer.lr=0.02", "schedule.name=constant", *CASES[case]
        )
        found[kind] = [stage.advance()["loss"] for _ in range(12)]
        assert all(one.isfinite().all() for one in stage.parameters)
    losses = found[precision]
    assert losses[0] == pytest.approx(found["fp32"][0], rel=0.05)
    if case != "edge":  # whose gap enters halfway
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    else:
        assert sum(losses[4:7]) < 0.97 * sum(losses[:3])


BAD = [
    ("edge", "alpha=-1", "alpha: expected a finite number that is not negative"),
    ("edge", "beta=-1", "beta: expected a finite"),
    ("edge", "margin=nan", "margin: expected"),
    ("edge", "tail=label", "tail: expected"),
    ("edge", "tail_fraction=0", "tail_fraction: expected a share in (0, 1], got 0"),
    ("edge", "gap_start=1.5", "loss.gap_start: expected a share from 0 to 1, got 1.5"),
    ("greg", "beta=-1", "beta: expected"),
    ("greg", "gradient_scale=x", "gradient_scale: expected"),
    ("greg", "second_order=x", "loss.second_order: expected one of exact, finite_difference, got 'x'"),
    ("greg", "step=0", "loss.chunk, loss.step: expected positive, got 32 and 0"),
    ("greg", "chunk=0", "loss.chunk, loss.step: expected positive, got 0 and 0.01"),
    ("greg", "step=inf", "loss.chunk, loss.step: expected positive"),
    ("greg", "margins=x", "loss.margins: expected one of auto, fixed"),
    ("gregplus", "temperature=0", "temperature: expected a positive number"),
    ("gregplus", "candidates=5", "loss.candidates: expected 128 or more"),
    ("gregplus", "clusters=9999", "loss.clusters: expected at most 384"),
    ("gregplus", "two_way=maybe", "loss.two_way: "),
    ("separation", "alpha=-1", "alpha: expected"),
    ("separation", "start=-0.1", "loss.start: expected a share from 0 to 1, got -0.1"),
    ("separation", "separation=x", "separation: expected"),
    ("separation", "sep_reduction=x", "sep_reduction: expected"),
    ("separation", "score_reduction=x", "loss.score_reduction: expected"),
    ("separation", "outlier_loss=x", "loss.outlier_loss: expected"),
    ("separation", "rank=3", "rank: expected with separation='projection' alone, got 3"),
    ("separation", "rank=-1", "rank: expected"),
    ("separation", "refresh=0", "refresh: expected"),
    ("separation", "weight=-1", "alpha: expected"),
    ("separation", "margins=fixed", "loss.margins: counts with loss.outlier_loss=energy alone"),
    ("oal", "transfer=x", "loss.transfer: expected"),
    ("oal", "teacher_outputs=x", "loss.teacher_outputs: expected"),
    ("oal", "contrast=x", "contrast: expected"),
    ("oal", "club_mode=x", "club_mode: expected"),
    ("oal", "temperature=0", "temperature: expected"),
    ("oal", "contrast_temperature=-1", "contrast_temperature: expected"),
    ("oal", "weight_logits=-1", "weight_logits: expected"),
    ("oal", "weight_features=inf", "weight_features: expected"),
    ("oal", "weight_mi=[]", "weight_mi: expected 1 numbers, one a bank, got 0"),
    ("oal", "weight_mi=[0.1,-1]", "weight_mi[1]: expected"),
    ("oal", "weight_mi=3", "loss.weight_mi: "),
    ("oal", "neighbour=0", "neighbour: expected a share of the class"),
    ("oal", "boundary=1.5", "boundary: expected a share of the class"),
    ("oal", "draws=0", "draws: expected"),
    ("oal", "keep=2000", "keep: expected 1500 or fewer"),
    ("oal", "rounds=0", "rounds: expected"),
    ("oal", "sigma=-1", "sigma: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "option", "message"), BAD)
def test_options_with_bad_values_are_one_line(method, option, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"method={method}", f"loss.{option}"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", list(METHODS))
def test_methods_and_the_kind_of_their_data(method):
    single, several = METHODS[method].score_names
    for name, kind, score in (("digits", "single", single), ("digits-multilabel", "multi", several)):
        overrides = [f"method={method}", f"data.name={name}"]
        if score is not None:
            assert load_config(None, overrides).multi_label == (kind == "multi")
            continue
        other = "single" if kind == "multi" else "multi"
        with pytest.raises(ConfigError) as caught:
            load_config(None, overrides)
        assert str(caught.value) == f"method: {method} is for {other}-label data, and data.name is {kind}-label"


def test_images_of_your_own_of_another_kind(tmp_path):
    """Known only once the images are there."""
    config = load_config(None, ["method=separation", f"output={tmp_path}", *SHORT])
    with pytest.raises(
        ConfigError, match=r"^method: separation is for single-label data, and data\.name is multi-label$"
    ):
        train(config, log=silent, report=False, split=split_of("digits-multilabel"))
    assert not list(tmp_path.rglob("last.ckpt"))


@pytest.mark.parametrize("method", ["greg", "gregplus"])
def test_a_multi_label_run(tmp_path, method):
    run = train(config_of(tmp_path, method, "data.name=digits-multilabel"), log=silent, report=False)
    assert run.method.score_name == "joint_energy"
    assert run.decided["margin_in"] < run.decided["margin_out"] < 0


def test_augmented_streams_and_the_choice(tmp_path):
    """Workers, which read ahead, change nothing, whatever a batch of candidates is."""
    runs = [
        train(config_of(tmp_path, "gregplus", f"name=w{n}", f"data.workers={n}", "loss.sample_every=2"), log=silent,
              report=False)
        for n in (0, 2)
    ]  # fmt: skip
    check_the_same(runs[1].folder, runs[0])


def test_smooth_networks_by_hook_train_with_every_method():
    """A network that speaks no protocol: its features are found by a hook on its head."""
    for method in ("greg", "gregplus", "separation", "oal"):
        stage = stage_of(method, *(OPTIONS[method]), "optimizer.lr=0.05", model=smooth(split_of()))
        losses = [stage.advance()["loss"] for _ in range(4)]
        assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["gregplus, in a round", "separation, projection", "oal, infonce", "edge, at the gap"])
def test_resuming_on_a_gpu(tmp_path, monkeypatch, case):
    """Checkpoints are read to the CPU; a round's candidates, a basis and prototypes are where the model is."""
    method, options = RESUMED[case]
    check_resuming(tmp_path, monkeypatch, method, (*options, "device=cuda"))
