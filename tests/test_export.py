"""A Detector as one file: .pt2 and .onnx in processes that have no oodkern, and what is wrong with a file."""

import copy
import json
import os
import sys

import numpy as np
import pytest
import torch
from picture_run import in_a_new_process, train_on, write_pictures
from torch import nn
from untrained import SHAPE, detector_of, images_of

import oodkern
from oodkern import export as exporting
from oodkern.classifier import Classifier
from oodkern.cli import main
from oodkern.export import ExportError, export

METHODS = {  # of each kind of score one
    "energy": ("method=energy", "loss.temperature=2.0"),
    "msp": ("method=oe",),
    "joint_energy": ("method=edge",),
    "msp+alignment": ("method=separation", "loss.score_reduction=sum"),
}
# Where `import oodkern` fails.
ALONE = """
import json, sys
sys.modules["oodkern"] = None
images, path = sys.argv[1:]
import numpy
images = numpy.load(images)
"""
PT2 = (
    ALONE
    + """
import torch
extra = {"oodkern.json": ""}
program = torch.export.load(path, extra_files=extra).module()
found = program(torch.from_numpy(images))
assert not found[1].requires_grad
print(json.dumps([json.loads(extra["oodkern.json"]), *(one.tolist() for one in found)]))
"""
)
ONNX = (
    ALONE
    + """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
assert "torch" not in sys.modules
found = session.run(None, {"images": images})
notes = session.get_modelmeta().custom_metadata_map["oodkern.json"]
print(json.dumps([json.loads(notes), *(one.tolist() for one in found)]))
"""
)
PROGRAMS = {"pt2": PT2, "onnx": ONNX}


class Doubled(nn.Module):
    """Speaks no protocol, so that its features are found by a hook; its logits are not what its head returns."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.fc = nn.Linear(600, classes)

    def forward(self, images):
        return 2 * self.fc(self.body(images))


def alone(path, images, folder):
    """Notes and prediction of a file, in a process in which oodkern cannot be imported."""
    np.save(folder / "images.npy", images.numpy())
    found, label, score, is_ood = in_a_new_process(PROGRAMS[path.suffix[1:]], folder / "images.npy", path)
    return found, torch.tensor(label), torch.tensor(score), torch.tensor(is_ood)


def needs(kind):
    if kind == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return train_on(write_pictures(folder), tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_run_on_image_folders_without_oodkern(run, kind, tmp_path, capsys):
    """By the verb; what the new process makes of image files is what `oodkern.load` makes of them."""
    needs(kind)
    assert main(["export", str(run.folder), "--out", str(tmp_path / "new"), "--format", kind]) == 0
    path = tmp_path / "new" / f"model.{kind}"
    said = capsys.readouterr().out
    assert "images [N, 3, 16, 16] -> label [N], score [N], is_ood [N]" in said
    assert "20 random images, 1, 2, 17 at a time: largest difference of scores" in said
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    detector = oodkern.load(run.folder)
    images = torch.stack([detector.read(one) for one in run.split.test.paths[:40]])
    found, label, score, is_ood = alone(path, images, tmp_path)
    expected = detector.predict(images)
    assert label.tolist() == expected.label.tolist()
    torch.testing.assert_close(score, expected.score, rtol=1e-5, atol=1e-5)
    assert is_ood.tolist() == (score > np.float32(run.threshold)).tolist()
    assert found["classes"] == list(run.split.classes)
    assert found["threshold"] == run.threshold
    assert found["input"] == {"name": "images", "shape": ["N", 3, 16, 16], "dtype": "float32", "range": [0, 1]}
    assert (found["score"], found["method"], found["resize"]) == ("energy", "energy", "stretch")
    assert found["versions"] == {"oodkern": oodkern.__version__, "torch": torch.__version__}


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("score", METHODS)
def test_every_score(score, kind, tmp_path):
    needs(kind)
    detector, path = detector_of(*METHODS[score]), tmp_path / f"a.{kind}"
    state = copy.deepcopy(detector.model.state_dict())
    found = detector.export(path)
    assert (found.path, found.bytes, found.agreement.images) == (path, path.stat().st_size, 20)
    assert 0 <= found.agreement.score_difference <= found.agreement.allowed < 0.01
    got = exporting.runner(path)
    for size in (1, 5, 33):
        one, expected = got(images_of(size)), detector.predict(images_of(size))
        assert torch.equal(one.label, expected.label)
        torch.testing.assert_close(one.score, expected.score, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.is_ood, one.score > detector.threshold)
    assert 10 < int(one.is_ood.sum()) < 23  # the threshold is amid the scores
    assert one.label.dtype == (torch.bool if score == "joint_energy" else torch.int64)
    assert len(one.label.unique(dim=0)) > 1
    assert all(torch.equal(value, state[key]) for key, value in detector.model.state_dict().items())


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_model_whose_features_are_found_by_a_hook(kind, tmp_path):
    """Its dropout is off, and what it does behind its head is kept. Both files without oodkern."""
    needs(kind)
    detector = detector_of(*METHODS["msp+alignment"], network=Doubled(5))
    assert not detector.model.by_protocol
    detector.model.train()  # whatever mode it is in
    detector.export(tmp_path / f"a.{kind}")
    assert detector.model.training
    detector.model.eval()
    expected, images = detector.predict(images_of(9)), images_of(9)
    _, label, score, is_ood = alone(tmp_path / f"a.{kind}", images, tmp_path)
    assert label.tolist() == expected.label.tolist()
    torch.testing.assert_close(score, expected.score, rtol=1e-5, atol=1e-5)
    assert is_ood.tolist() == expected.is_ood.tolist()


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_tiny_patch16_224", "torchvision:resnet18"])
def test_backbones_of_other_libraries(name, kind, tmp_path):
    needs(kind)
    library, _, model = name.partition(":")
    module = pytest.importorskip(library)
    if library == "timm":
        network = module.create_model(model, num_classes=5, **{"img_size": 32} if "vit" in model else {})
    else:
        network = module.models.get_model(model, num_classes=5)
    detector = detector_of("method=separation")
    detector.model, detector.shape = Classifier(network).eval(), (3, 32, 32)
    assert detector.model.by_protocol == (library == "timm")
    found = export(detector, tmp_path / f"a.{kind}", batches=(1, 3)).agreement
    assert found.images == 4
    assert found.score_difference <= found.allowed


def test_nothing_of_the_machine_is_in_a_file(tmp_path):
    detector_of().export(tmp_path / "a.pt2")
    content = (tmp_path / "a.pt2").read_bytes()
    for path in (oodkern.__file__, torch.__file__):
        assert os.path.dirname(path).encode() not in content


def test_what_an_onnx_file_says(tmp_path):
    needs("onnx")
    import onnx

    detector_of().export(tmp_path / "a.onnx", opset=20)
    found = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert [one.version for one in found.opset_import if not one.domain] == [20]
    assert {one.domain for one in found.graph.node} == {""}
    sizes = {
        one.name: [size.dim_param or size.dim_value for size in one.type.tensor_type.shape.dim]
        for one in (*found.graph.input, *found.graph.output)
    }
    assert sizes == {"images": ["N", *SHAPE], "label": ["N"], "score": ["N"], "is_ood": ["N"]}
    assert len(list(tmp_path.iterdir())) == 1  # no weights beside it
    assert os.path.dirname(torch.__file__).encode() not in (tmp_path / "a.onnx").read_bytes()
    with pytest.raises(ExportError, match=r"a\.onnx: not written: (opset: expected 99, got|model: no ONNX of it \()"):
        detector_of().export(tmp_path / "a.onnx", opset=99)


def test_the_record_of_the_verb(run, capsys, tmp_path):
    assert main(["export", str(run.folder), "--checkpoint", "best", "--out", str(tmp_path), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["path"], record["images"]) == (str(tmp_path / "model.pt2"), 20)
    assert record["bytes"] == (tmp_path / "model.pt2").stat().st_size


def test_real_cifar_folders(real_data, tmp_path):
    """A run on image files as the protocols have them, and its file without oodkern."""
    import subprocess

    folders = tmp_path / "data"
    done = subprocess.run([sys.executable, real_data / "unpack.py", folders, "cifar10", "dtd"], capture_output=True)
    assert done.returncode == 0, done.stderr
    words = ("data.size=32", "data.classes=[6,2,2]", "data.limit=640", f"data.ood.dtd=folder:{folders / 'ood' / 'dtd'}")
    one = train_on(folders / "cifar10", tmp_path, *words, "epochs=1", "pretrain.epochs=1")
    detector = oodkern.load(one.folder)
    detector.export(tmp_path / "a.pt2")
    images = torch.stack([detector.read(path) for path in one.split.test.paths[:200]])
    expected = detector.predict(images)
    found, label, score, is_ood = alone(tmp_path / "a.pt2", images, tmp_path)
    assert found["classes"] == list(one.split.classes)
    assert label.tolist() == expected.label.tolist()
    torch.testing.assert_close(score, expected.score, rtol=1e-5, atol=1e-5)
    assert is_ood.tolist() == (score > np.float32(one.threshold)).tolist()
