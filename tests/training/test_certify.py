"""`oodkern evaluate --certificate`: the radii of a run's score."""

import json
import shutil

import pytest
import torch

from oodkern import tables
from oodkern.cli import main
from oodkern.training import load_run, train
from oodkern.training.certify import as_json, certify, quartiles, summary


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
    head = next(line for line in text.splitlines() if "radius of these" in line)
    assert head.split()[:3] == ["set", "images", "accepted"]
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


INF, NAN = float("inf"), float("nan")


def strict(text):
    def refused(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refused)


def test_quartiles_are_values_and_never_mixed_with_infinity():
    values = torch.tensor([3.0, INF, 1.0, 2.0, INF, INF])  # of five steps: at 1.25, 2.5 and 3.75
    assert quartiles(values) == [2.0, 3.0, INF]
    assert quartiles(torch.tensor([INF, INF])) == [INF] * 3
    assert quartiles(torch.tensor([5.0])) == [5.0] * 3
    assert quartiles(torch.tensor([])) is None


def test_undefined_radii_are_on_neither_side():
    radius = torch.tensor([1.0, INF, NAN, -2.0, -INF, -3.0, NAN, 0.0])
    norm = torch.tensor([1.0, 0.0, NAN, 2.0, 0.0, 3.0, 9.0, 4.0])
    assert summary(radius, norm) == {
        "images": 8,
        "share_accepted": 3 / 8,
        "accepted": [0.0, 1.0, 1.0],
        "flagged": [2.0, 3.0, 3.0],
        "gradient_norm": [0.0, 1.0, 2.0],
        "undefined": 2,
    }
    assert "undefined" not in summary(radius[:2], norm[:2])
    nothing = summary(radius[[2, 6]], norm[[2, 6]])
    assert [nothing[key] for key in ("accepted", "flagged", "gradient_norm")] == [None] * 3


def test_infinity_is_a_word_in_json():
    found = summary(torch.tensor([INF, -INF, -1.0, NAN]), torch.tensor([0.0, 0.0, 1.0, NAN]))
    record = strict(json.dumps(as_json(found)))
    assert record["accepted"] == ["inf"] * 3
    assert record["flagged"] == [1.0] * 3
    assert (record["images"], record["undefined"]) == (4, 1)


def test_the_table_counts_undefined_radii_where_there_are_some():
    whole = summary(torch.tensor([INF, -1.0]), torch.tensor([0.0, 1.0]))
    some = summary(torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]))
    assert "undefined" not in tables.certificate_table({"id": whole})
    head, _, first, second = tables.certificate_table({"id": whole, "far": some}).splitlines()[:4]
    assert head.endswith("  undefined")
    assert " ".join(first.split()) == "ID 2 50.0 inf (inf .. inf) 1 (1 .. 1) 0 (0 .. 0) 0"
    assert second.split()[-1] == "1"


def test_a_network_whose_scores_do_not_change(run, tmp_path, capsys):
    """No gradient anywhere: every radius is infinite, and the record is JSON all the same."""
    folder = tmp_path / "still"
    shutil.copytree(run.folder, folder)
    stored = torch.load(folder / "last.ckpt", weights_only=True)
    stored["model"] = {name: one * 0 if one.dim() == 4 else one for name, one in stored["model"].items()}
    torch.save(stored, folder / "last.ckpt")
    assert main(["evaluate", str(folder), "--certificate", "--json"]) == 0
    found = strict(capsys.readouterr().out)["certificate"]["id"]
    assert (found["accepted"] or found["flagged"]) == ["inf"] * 3
    assert found["gradient_norm"] == [0.0] * 3
