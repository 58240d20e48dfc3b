"""A pretrained model that runs share: it changes no number, and is made again where it is not the right one."""

from functools import partial

import numpy as np
import pytest
import torch
from stages import DRAWN
from test_resume import same

from oodkern.config import ConfigError, load_config
from oodkern.training import train
from oodkern.training.comparison import compare, signed
from oodkern.training.files import load_checkpoint, save_checkpoint
from oodkern.training.pretrained import LATER, key_of
from oodkern.training.trainer import Trainer

SHORT = ("epochs=1", "pretrain.epochs=1", "model.width=4", "data.limit=320", "model.dropout=0.3")
OPTIONS = {"gregplus": ("loss.clusters=8",), "oal": (*DRAWN, "loss.transfer=mlp")}


def silent(line):
    pass


def config_of(folder, method, *overrides):
    return load_config(None, [f"method={method}", f"output={folder}", *SHORT, *OPTIONS.get(method, ()), *overrides])


@pytest.fixture
def stages(monkeypatch):
    """The kinds of the stages that are trained."""
    seen, whole = [], Trainer.train_stage

    def watching(self, kind, *arguments):
        seen.append(kind)
        return whole(self, kind, *arguments)

    monkeypatch.setattr(Trainer, "train_stage", watching)
    return seen


def check_the_same(run, other):
    """Tensors, optimizer, random state, scores, threshold, log; but for the times, and what the log says of them."""
    one, two = (load_checkpoint(found.folder / "last.ckpt") for found in (run, other))
    for key in one.keys() - {"seconds", "log_bytes"}:
        assert same(one[key], two[key]), key
    scores, known = (np.load(found.folder / "scores.npz") for found in (run, other))
    assert all((scores[name] == known[name]).all() for name in known)
    assert run.threshold == other.threshold
    # Of pretraining the validation by the method's score is left out.
    lines = [[{**line, "validation_auroc": None} if line["stage"] == "pretrain" else line for line in found.history]
             for found in (run, other)]  # fmt: skip
    assert same(*lines)


@pytest.mark.parametrize("method", ["oe", "energy", "greg", "gregplus", "separation", "oal"])
def test_a_run_that_takes_the_file_is_the_one_that_does_not(tmp_path, method, stages):
    shared = tmp_path / "shared" / "model.ckpt"
    train(config_of(tmp_path, "ce"), silent, report=False, pretrained=shared)
    assert stages == ["pretrain", "method"]
    alone = train(config_of(tmp_path, method, "name=alone"), silent, report=False)
    stages.clear()
    taken = train(config_of(tmp_path, method, "name=taken"), silent, report=False, pretrained=shared)
    assert stages == ["method"]
    check_the_same(taken, alone)
    weights = load_checkpoint(shared)["model"]
    assert same(load_checkpoint(taken.folder / "last.ckpt")["baseline"], dict(weights))
    lines = [line for line in taken.history if line["stage"] == "pretrain"]
    assert len(lines) == 1
    assert "validation_auroc" not in lines[0], "it is of another method's score"
    assert "validation_accuracy" in lines[0]


def test_writing_the_file_changes_nothing(tmp_path):
    plain = train(config_of(tmp_path, "energy", "name=a"), silent, report=False)
    writing = train(config_of(tmp_path, "energy", "name=b"), silent, report=False, pretrained=tmp_path / "m.ckpt")
    check_the_same(writing, plain)


CHANGES = ("seed=1", "pretrain.lr=0.02", "pretrain.epochs=2", "model.dropout=0.1", "precision=bf16", "head=fused",
           "optimizer.batch_size=32", "optimizer.weight_decay=0.01", "schedule.name=constant", "data.limit=256",
           "data.split=1", "data.augmentation=flip", "threads=1")  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_another_configuration_is_made_again(tmp_path, change, stages):
    shared = tmp_path / "m.ckpt"
    threads = torch.get_num_threads()
    train(config_of(tmp_path, "ce", "name=first"), silent, report=False, pretrained=shared)
    before = shared.read_bytes()
    stages.clear()
    taken = train(config_of(tmp_path, "oe", change, "name=taken"), silent, report=False, pretrained=shared)
    assert stages == ["pretrain", "method"]
    assert shared.read_bytes() != before
    assert load_checkpoint(shared)["key"] == key_of(taken.config, taken.split)
    torch.set_num_threads(threads)


def test_what_comes_later_does_not_matter(tmp_path, stages):
    shared = tmp_path / "m.ckpt"
    train(config_of(tmp_path, "ce"), silent, report=False, pretrained=shared)
    later = ("epochs=2", "optimizer.lr=0.03", "optimizer.outlier_batch_size=32", "split_forward=true",
             "checkpoint_steps=3", "loss.alpha=0.3", "name=later", "data.workers=1")  # fmt: skip
    stages.clear()
    taken = train(config_of(tmp_path, "oe", *later), silent, report=False, pretrained=shared)
    assert stages == ["method"]
    alone = train(config_of(tmp_path, "oe", *later[:-2], "name=alone"), silent, report=False)
    check_the_same(taken, alone)
    assert {one.split("=")[0] for one in later if not one.startswith("loss")} <= set(LATER)


def damaged(kind, path):
    state = load_checkpoint(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "no checkpoint":
        path.write_text("hello")
    elif kind == "without a random state":
        state["model"] = {key: torch.zeros_like(one) for key, one in state["model"].items()}
        del state["random"]
    elif kind == "without lines":
        del state["lines"]
    elif kind == "a weight is missing":
        state["model"] = {key: one + 1 for key, one in state["model"].items() if not key.endswith("fc.weight")}
    elif kind == "half a random state":
        state["random"]["torch"] = torch.Generator().manual_seed(9).get_state()
        state["random"]["numpy"] = None
    elif kind == "another format":
        state["format"] = 0
    if kind not in ("cut", "no checkpoint"):
        save_checkpoint(path, state)


@pytest.mark.parametrize(
    "kind",
    [
        "cut", "no checkpoint", "without a random state", "without lines", "a weight is missing",
        "half a random state", "another format",
    ],
)  # fmt: skip
def test_a_damaged_file_is_made_again_and_leaves_no_trace(tmp_path, kind, stages):
    shared = tmp_path / "m.ckpt"
    whole = train(config_of(tmp_path, "oe", "name=whole"), silent, report=False, pretrained=shared)
    known = load_checkpoint(shared)
    damaged(kind, shared)
    stages.clear()
    again = train(config_of(tmp_path, "oe", "name=again"), silent, report=False, pretrained=shared)
    assert stages == ["pretrain", "method"]
    check_the_same(again, whole)
    found = load_checkpoint(shared)
    assert all(same(found[key], known[key]) for key in ("model", "random", "key"))


def test_a_run_stopped_while_pretraining_writes_the_file_when_resumed(tmp_path, monkeypatch):
    from oodkern.training.stage import Stage

    shared, advance = tmp_path / "m.ckpt", Stage.advance

    def stopping(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return advance(self)

    whole = train(config_of(tmp_path, "oe", "name=whole", "checkpoint_steps=1"), silent, report=False)
    monkeypatch.setattr(Stage, "advance", stopping)
    config = config_of(tmp_path, "oe", "name=stopped", "checkpoint_steps=1")
    with pytest.raises(KeyboardInterrupt):
        train(config, silent, report=False, pretrained=shared)
    assert not shared.exists()
    monkeypatch.setattr(Stage, "advance", advance)
    check_the_same(train(config, silent, report=False, resume=True, pretrained=shared), whole)
    taken = train(config_of(tmp_path, "oe", "name=taken"), silent, report=False, pretrained=shared)
    assert taken.method.ood == whole.method.ood


def test_a_comparison_pretrains_once_for_each_split_and_seed(tmp_path, stages):
    methods = ["ce", "oe", "energy"]
    compare(methods, [0, 1], [0, 1], [*SHORT, f"output={tmp_path}"], log=silent)
    assert stages.count("pretrain") == 4
    assert stages.count("method") == 12
    names = {f"ce-split{split}-seed{seed}.ckpt" for split in (0, 1) for seed in (0, 1)}
    assert {path.name for path in (tmp_path / "pretrained").iterdir()} == names
    stages.clear()
    compare([*methods, "separation"], [0], [0], [*SHORT, f"output={tmp_path}"], log=silent)
    assert stages.count("pretrain") == 0, "a method that comes later starts from the same model"


def test_a_multi_label_comparison(tmp_path, stages):
    data = ["data.name=digits-multilabel", "model.width=8"]
    found = compare(["oe", "energy", "edge"], [0], [0], [*SHORT, *data, f"output={tmp_path}"], log=silent)
    assert stages.count("pretrain") == 1
    assert found.multi_label
    assert found.data == "digits-multilabel"
    table = found.table()
    assert "ID mAP" in table
    assert "ID accuracy" not in table
    recorded = found.as_dict("oodkern compare")
    assert (recorded["multi_label"], recorded["methods"]) == (True, ["ce", "oe", "energy", "edge"])
    assert set(recorded["runs"][0]["by_score"]) == {"max_logit", "joint_energy"}
    starts = [load_checkpoint(tmp_path / f"digits-multilabel-{m}-split0-seed0" / "last.ckpt")["baseline"]
              for m in found.methods]  # fmt: skip
    assert all(same(one, starts[0]) for one in starts)


def test_methods_with_data_of_their_own_are_not_mixed(tmp_path):
    run = partial(compare, seeds=[0], splits=[None], log=silent)
    with pytest.raises(ConfigError) as caught:
        run(["energy", "edge"], overrides=[f"output={tmp_path}"])
    message = (
        "data.name: methods have digits and digits-multilabel as their own data, expected one for all; "
        "give data.name=..."
    )
    assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"^method: edge is for multi-label data, and data\.name is single-label$"):
        run(["edge"], overrides=[f"output={tmp_path}", "data.name=digits"])
    with pytest.raises(ConfigError, match=r"^method: oal is for single-label data, and data\.name is multi-label$"):
        run(["oal", "edge"], overrides=[f"output={tmp_path}", "data.name=digits-multilabel"])
    assert not list(tmp_path.iterdir())


def test_signs():
    assert [signed(one) for one in (-0.0, -0.0004, 0.0004, -0.0006, 0.05)] == ["+0.0", "+0.0", "+0.0", "-0.1", "+5.0"]
