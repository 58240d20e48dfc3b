"""Runs on sets with image files that cannot be read: they end with the same numbers however they are read."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet, DataError, FolderSet, augment
from oodkern.models import SmallCNN
from oodkern.processes import Processes
from oodkern.training import evaluation, train
from oodkern.training.evaluation import evaluate, plain_score, scored
from oodkern.training.files import read_json_lines
from oodkern.training.stage import Stage

OPTIONS = ("model.width=4", "epochs=2", "pretrain.epochs=1", "optimizer.batch_size=16", "checkpoint_steps=1")
TIMED = ("seconds", "images_per_second")
NO_IMAGE = b"GIF89a no image"
DAMAGED = ("id/train/0/03.png", "id/test/1/02.png", "out/05.png", "far/07.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two classes, outliers and an OOD set of colours; in each folder one file is no image."""
    root, draws = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    colours = {"id/train/0": 40, "id/train/1": 160, "id/test/0": 40, "id/test/1": 160, "out": 90, "far": 220}
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for i in range(24):
            image = np.clip(colour + draws.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / name / f"{i:02d}.png")
    for name in DAMAGED:
        (root / name).write_bytes(NO_IMAGE)
    return root


def configured(sets, output, *more):
    sources = [f"data.name=folder:{sets}/id", f"data.outliers=folder:{sets}/out", f"data.ood.far=folder:{sets}/far"]
    return load_config(None, [*sources, "data.size=8", *OPTIONS, f"output={output}", *more])


def lines_of(run):
    return [{key: value for key, value in one.items() if key not in TIMED} for one in run.history]


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
    said = []
    return train(configured(sets, tmp_path_factory.mktemp("whole")), log=said.append), said


def test_each_is_named_once(sets, whole):
    """Those of the test too, which is looked at once at the end."""
    run, said = whole
    told = [line for line in said if line.startswith("left out, /")]
    assert sorted(
        line.removeprefix(f"left out, {sets}/").split(": not a readable image (")[0] for line in told
    ) == sorted(DAMAGED)
    assert (run.folder / "report.html").is_file()


def test_rows_of_an_evaluation_are_of_images_that_are_there(whole):
    run, _ = whole
    assert len(run.method.scores["id"]) == len(run.split.test) - 1 == 47
    assert len(run.method.scores["far"]) == 23
    paths = [run.split.test.paths[i] for i in run.method.indices["id"].tolist()]
    assert "id/test/1/02.png" not in {"/".join(path.parts[-4:]) for path in paths}
    again = run.split.test.select(run.method.indices["id"])
    logits = evaluation.logits_of(run.model, again)
    assert run.method.accuracy == evaluation.correct(logits, again.labels)


def test_the_scores_say_whose_they_are(whole):
    run, _ = whole
    with np.load(run.folder / "scores.npz") as stored:
        kept = {name.partition("/")[2]: stored[name] for name in stored if name.startswith("indices/")}
        assert set(kept) == {"id", "far"}
        assert sorted(set(range(24)) - set(kept["far"].tolist())) == [7]
        assert len(kept["id"]) == len(stored["id"]) == 47


def test_a_resumed_run_with_workers_ends_alike(sets, whole, tmp_path, monkeypatch):
    run, _ = whole
    config = configured(sets, tmp_path, "data.workers=2")
    advance = Stage.advance

    def dies(stage):
        if stage.kind == "method" and stage.step == 2:
            raise OSError("killed")
        return advance(stage)

    monkeypatch.setattr(Stage, "advance", dies)
    with pytest.raises(OSError, match="killed"):
        train(config, log=lambda line: None, report=False)
    monkeypatch.undo()
    found = train(config, log=lambda line: None, report=False, resume=True)
    assert lines_of(found) == lines_of(run)
    for name, value in run.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


def test_past_the_limit_a_run_ends(sets, tmp_path):
    (tmp_path / "out").mkdir()
    for i, path in enumerate(sorted((sets / "out").iterdir())):
        (tmp_path / "out" / path.name).write_bytes(NO_IMAGE if i < 2 else path.read_bytes())
    config = configured(sets, tmp_path / "run", f"data.outliers=folder:{tmp_path}/out")
    with pytest.raises(DataError, match=r"^[23] of 24 image files cannot be read, and more than 1 .*/out/0"):
        train(config, log=lambda line: None, report=False)


def test_what_is_not_installed_is_an_error_before_training(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(augment, "installed", lambda: False)
    config = configured(sets, tmp_path, "data.outlier_augmentation=trivial+flip")
    reason = r"^data\.outlier_augmentation: trivial needs torchvision, .*: pip install 'oodkern\[vision\]'$"
    with pytest.raises(ConfigError, match=reason):
        train(config, log=lambda line: None, report=False)
    assert read_json_lines(config.folder / "metrics.jsonl") == []


class Shares(Processes):
    """One process after the other in place of all at once."""

    def gather(self, rows):
        return rows


def test_shares_of_an_evaluation_are_the_whole(tmp_path):
    """Also of a process all of whose images are unreadable, and of one that has none to look at."""
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        if i in (0, 1, 3):
            path.write_bytes(NO_IMAGE)
        else:
            Image.new("RGB", (8, 8), (40 * i, 7, 90)).save(path)
    images = FolderSet(paths, torch.arange(5), size=8)
    images.damage.limit = 3
    model = Classifier(SmallCNN(3, 2, 4))
    scores = {"": partial(plain_score, "energy")}
    alone = scored(model, images, scores)
    assert alone.indices.tolist() == [2, 4]
    memory = scored(model, ArraySet(images.readable(torch.tensor([2, 4]))[0], torch.zeros(2).long()), scores)
    assert torch.equal(alone.logits, memory.logits)
    for count in (2, 5, 7):
        parts = [scored(model, images, scores, processes=Shares(rank, count)) for rank in range(count)]
        assert torch.cat([part.indices for part in parts]).tolist() == [2, 4]
        torch.testing.assert_close(torch.cat([part.logits for part in parts]), alone.logits)
        torch.testing.assert_close(torch.cat([part.scores[""] for part in parts]), alone.scores[""])
    assert scored(model, images, scores, batch_size=1).indices.tolist() == [2, 4]


def test_sets_in_memory_have_all_rows(whole):
    run, _ = whole
    found = evaluate(run.model, run.split, "energy", partial(plain_score, "energy"))
    assert found.indices["far"].tolist() == [i for i in range(24) if i != 7]
    assert scored(run.model, ArraySet(torch.rand(3, 3, 8, 8), torch.zeros(3).long()), {}).indices.tolist() == [0, 1, 2]
