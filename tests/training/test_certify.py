"""`oodkern evaluate --certificate`: the radii of a run's score."""

import json

import pytest
import torch

from oodkern import tables
from oodkern.cli import main
from oodkern.training import load_run, train
from oodkern.training.certify import certify, quartiles


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from oodkern.config import load_config

    folder = tmp_path_factory.mktemp("certify")
    config = load_config(
        None, [f"output={folder}", "method=separation", "epochs=1", "pretrain.epochs=2", "model.width=4"]
    )
    return train(config, log=lambda line: None, report=False)


def test_radii_are_margin_over_slope(run):
    """Against autograd on the method's score, image by image."""
    detector, images = load_run(run.folder), run.split.test_ood["near"].select(torch.arange(40))
    pixels = images.images(torch.arange(40)).requires_grad_()
    score = detector.method.score(detector.model.outputs(pixels), detector.model.head.weight)
    (slope,) = torch.autograd.grad(score.sum(), pixels)
    norm = slope.flatten(1).norm(dim=1)
    radius = (detector.threshold - score.detach()) / norm
    found = certify(detector, images, batch_size=16)
    assert found["images"] == 40
    assert found["share_accepted"] == pytest.approx(float((score <= detector.threshold).double().mean()))
    assert found["gradient_norm"] == pytest.approx(quartiles(norm), rel=1e-4)
    for side, expected in (("accepted", radius[radius >= 0]), ("flagged", -radius[radius < 0])):
        if len(expected):
            assert found[side] == pytest.approx(quartiles(expected), rel=1e-3)
        else:
            assert found[side] is None
    assert all(parameter.grad is None for parameter in detector.model.parameters())


def test_a_step_of_the_radius_reaches_the_threshold(run):
    """To first order: the score moves by nearly the margin along its gradient, for images that are near it."""
    detector = load_run(run.folder)
    pixels = run.split.test.images(torch.arange(len(run.split.test))).requires_grad_()

    def score(x):
        return detector.method.score(detector.model.outputs(x), detector.model.head.weight)

    value = score(pixels)
    (slope,) = torch.autograd.grad(value.sum(), pixels)
    norm = slope.flatten(1).norm(dim=1)
    radius = (detector.threshold - value.detach()) / norm
    near = radius.abs().argsort()[:5]
    step = (radius / norm).view(-1, 1, 1, 1) * slope
    with torch.no_grad():
        after = score(pixels[near] + step[near])
    before = (detector.threshold - value[near]).abs()
    assert ((detector.threshold - after).abs() < 0.5 * before).all()


def test_the_verb_tells_them(run, capsys):
    assert main(["evaluate", str(run.folder), "--certificate"]) == 0
    text = capsys.readouterr().out
    assert "Heuristic for non-linear networks" in text
    rows = [line.split()[0] for line in text.split("radius of these")[1].splitlines()[2:5]]
    assert rows == ["ID", "near", "far"]
    assert main(["evaluate", str(run.folder), "--certificate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["certificate"].keys() == {"id", "near", "far"}
    assert found["certificate"]["id"]["share_accepted"] == pytest.approx(1 - found["flagged"]["id"])
    assert main(["evaluate", str(run.folder), "--json"]) == 0
    assert "certificate" not in json.loads(capsys.readouterr().out)


def test_a_side_without_images_is_left_empty():
    found = {
        "images": 3,
        "share_accepted": 1.0,
        "accepted": [1.0, 2.0, 3.0],
        "flagged": None,
        "gradient_norm": [0.1] * 3,
    }
    line = tables.certificate_table({"far": found}).splitlines()[2]
    assert line.split() == ["far", "3", "100.0", "2", "(1", "..", "3)", "0.1", "(0.1", "..", "0.1)"]
