"""A trained model at work: its threshold, image files, and a process that has nothing of the training."""

import pytest
import torch
from picture_run import in_a_new_process, train_on, write_pictures

import oodkern
from oodkern.config import ConfigError, load_config
from oodkern.data import DataError
from oodkern.detector import Detector, find_device, name_of
from oodkern.metrics import threshold_at_recall
from oodkern.training import load_run, train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    return train_on(folders, tmp_path_factory.mktemp("runs"))


def test_a_process_without_the_training_predicts_the_same(run, folders):
    """Trained on image folders; image files in, and no module of `oodkern.training` is imported, or could be."""
    paths = sorted(folders.rglob("*.jpg"))[::10]
    found = in_a_new_process(
        """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("oodkern.training"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import oodkern, torch
from pathlib import Path
detector = oodkern.load(sys.argv[1])
found = detector.predict(torch.stack([detector.read(Path(path)) for path in sys.argv[2:]]))
assert not [name for name in sys.modules if name.startswith("oodkern.training")]
names = [detector.classes[label] for label in found.label]
print(json.dumps([names, found.score.tolist(), found.is_ood.tolist()]))
""",
        run.folder,
        *paths,
    )
    detector = oodkern.load(run.folder)
    expected = detector.predict(torch.stack([detector.read(path) for path in paths]))
    assert found[0] == [detector.classes[label] for label in expected.label.tolist()]
    torch.testing.assert_close(torch.tensor(found[1]), expected.score, rtol=1e-5, atol=1e-5)
    assert found[2] == (expected.score > run.threshold).tolist()
    assert {"red", "green", "blue"} >= set(found[0])


def test_the_training_has_the_same_names():
    assert load_run is oodkern.load
    assert oodkern.training.Detector is Detector
    assert "load" in dir(oodkern)


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_the_threshold_is_the_smallest_that_accepts_95_percent_of_the_validation_images(run, checkpoint):
    detector, images = oodkern.load(run.folder, checkpoint), run.split.validation
    found = detector.predict(images.images(torch.arange(len(images))))
    assert len(images) == 9  # 95 % of which are all 9, and the threshold is the largest score
    assert not found.is_ood.any()
    assert detector.threshold == threshold_at_recall(found.score) == float(found.score.max())


def test_the_threshold_of_many_images(tmp_path):
    words = (f"output={tmp_path}", "name=r", "epochs=1", "pretrain.epochs=1", "method=oe")
    run = train(load_config(None, words), log=lambda line: None, report=False)
    detector, images = oodkern.load(run.folder), run.split.validation
    found = detector.predict(images.images(torch.arange(len(images))))
    accepted, at_least = int((~found.is_ood).sum()), 0.95 * len(images)
    assert detector.threshold == threshold_at_recall(found.score) == run.threshold
    assert at_least <= accepted < len(images)
    assert int((found.score < detector.threshold).sum()) < at_least  # the next smaller threshold accepts too few


def test_image_files_are_read_as_they_were_trained_on(run, tmp_path):
    detector, trained = oodkern.load(run.folder), run.split.train
    assert detector.shape == trained.shape == (3, 16, 16)
    for index in (0, 40):
        assert torch.equal(detector.read(trained.paths[index]), trained.images(torch.tensor([index]))[0])
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(trained.paths[0].read_bytes()[:40])
    with pytest.raises(DataError, match=r"damaged\.jpg: not a readable image"):
        detector.read(damaged)


def test_what_is_wrong_with_a_run(run, tmp_path):
    with pytest.raises(ConfigError, match=r"expected the folder of a run, with a config\.yaml"):
        oodkern.load(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint: expected last or best, got 'first'"):
        oodkern.load(run.folder, "first")
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"last\.ckpt: no such file"):
        oodkern.load(tmp_path)
    whole = (run.folder / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"last\.ckpt: not a readable checkpoint"):
        oodkern.load(tmp_path)
    torch.save({"format": 99}, tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt: expected a checkpoint of format 1, got 99"):
        oodkern.load(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(whole)
    for found, wrong in (("name: small_cnn", "name: timm:no_such_model"), ("width: 4", "width: 5")):
        (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text().replace(found, wrong))
        with pytest.raises(ConfigError, match=r"^model"):
            oodkern.load(tmp_path)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        find_device("gpu")
    with pytest.raises(ConfigError, match=r"device: expected one of \d+ CUDA devices, got cuda:99"):
        find_device("cuda:99")


def test_labels_in_words():
    assert name_of(1, ("a", "b")) == "b"
    assert name_of([True, False, True], ("a", "b", "c")) == "a+c"
    assert name_of([False, False], ("a", "b")) == "none"
