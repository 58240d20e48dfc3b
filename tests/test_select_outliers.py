"""`oodkern select-outliers`: its figure, its table and its record, and the verb as a person calls it."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from oodkern.cli import main
from oodkern.data import DataConfig, build_split
from oodkern.outlier_sets import RankedSet, dilation_distance, rank_outlier_sets
from oodkern.report.spectra import outlier_set_figure, points, ranking_record, ranking_table
from oodkern.training import load_run


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ranked_of(*distances, error=0.1):
    spectrum = torch.linspace(1, 0, 64).double()
    return [RankedSet(f"set-{i}", 640, 10, d, error, spectrum, 2 * spectrum) for i, d in enumerate(distances)]


def text_of(drawn):
    return [element.text.strip() for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_figure(error):
    ranked = ranked_of(0.0, 2.0, 3.0, error=error)
    drawn = outlier_set_figure(ranked, 32)
    assert drawn == outlier_set_figure(ranked, 32)
    words = text_of(drawn)
    assert words.count("set-0") == words.count("set-2") == 2  # legend, bar
    assert "ID" in words
    assert "singular value (the dashed line: the first 32 are compared)" in words
    label = {element.text.strip(): element for element in ElementTree.fromstring(drawn).iter() if element.text}
    assert float(label["set-0"].get("y")) < float(label["set-2"].get("y")), "the closest is above"
    assert any("10^" in comment or "{10" in comment for comment in re.findall("<!--(.*?)-->", drawn)), "powers of ten"
    ids = [element.get("id") for element in ElementTree.fromstring(drawn).iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert len(text_of(outlier_set_figure(ranked_of(*range(20)), 8))) > 40


def test_told_apart_by_two_standard_errors_of_both():
    first, second, third = ranked_of(1.0, 1.39, 1.41)
    assert first.told_apart(third)
    assert third.told_apart(first)
    assert not first.told_apart(second)
    assert ranking_record([first, second, third], dict.fromkeys(["set-0", "set-1", "set-2"]))["not_told_apart"] == [
        "set-1"
    ]
    assert "Closest: set-0. By these images it cannot be told apart from set-1.\n" in ranking_table(
        [first, second, third], 64
    )


def test_rounding_is_not_drawn():
    _, values = points(torch.tensor([2.0, 1.0, 1e-8, 0.0]).double())
    assert values.tolist()[:2] == [2.0, 1.0]
    assert np.isnan(values[2:]).all()


@pytest.fixture(scope="module", params=["digits", "digits-multilabel"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("select")
    short = ["epochs=1", "pretrain.epochs=1", "model.width=4", "method=ce", f"data.name={request.param}", "name=r"]
    assert main(["train", *short, f"output={folder}", "--quiet"]) == 0
    near = build_split(DataConfig(name=request.param))
    noise = np.random.default_rng(0)
    pixels = (near.test_ood["near"].images(torch.arange(80))[:, 0] * 255).round().byte().numpy()
    for i, image in enumerate(pixels):
        write_image(folder / "near" / f"{i}.png", image)
        write_image(folder / "noise" / "class" / f"{i}.png", noise.integers(0, 256, image.shape, np.uint8))
        if i < 5:
            write_image(folder / "few" / f"{i}.png", image)
    return folder


def test_verb(run, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.chdir(run)
    asked = ["select-outliers", "r", "noise=folder:noise", "near=near", "--batch-size", "32"]
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].split() == ["rank", "set", "images", "distance", "+-"]
    assert [line.split()[:3] for line in lines[2:4]] == [["1", "near", "80"], ["2", "noise", "80"]]
    assert len(set(map(len, lines[:4]))) == 1, "columns are aligned"
    assert "Closest: near." in captured.out
    assert "does not state which direction is meant" in captured.out
    assert "From batches of 32 images, 2 of each set" in captured.out
    assert lines[-1] == "The spectra and the distances are in r/outlier-sets.svg"
    assert max(map(len, lines)) <= 120
    words = text_of((run / "r" / "outlier-sets.svg").read_text())
    assert words.count("near") == words.count("noise") == 2

    shutil.copytree("r", "other", dirs_exist_ok=True)
    (run / "other" / "last.ckpt").unlink()
    asked[1] = "other"
    assert main([*asked, "--json", "--out", "an/other", "--images", "40", "--top", "8", "--checkpoint", "best"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["closest"], found["batches"], found["top"], found["checkpoint"]) == ("near", 1, 8, "best")
    assert found["not_told_apart"] == ["noise"], "one batch has no standard error"
    near, noise = found["sets"]
    assert (near["name"], near["source"], near["images"], near["standard_error"]) == ("near", "near", 80, None)
    assert noise["distance"] > near["distance"]
    spectra = [torch.tensor(one, dtype=torch.float64) for one in (found["id_spectrum"], near["spectrum"])]
    assert dilation_distance(*spectra, 8) == pytest.approx(near["distance"])
    assert len(near["spectrum"]) == 32
    assert found["figure"] == "an/other/outlier-sets.svg"
    assert [path.name for path in (run / "an" / "other").iterdir()] == ["outlier-sets.svg"]


def test_verb_agrees_with_the_function(run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert main(["select-outliers", "r", "far=photos", "--images", "128", "--seed", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    detector = load_run("r")
    split = build_split(detector.config.data)
    far = {"far": split.test_ood["far"].as_outliers()}
    (expected,) = rank_outlier_sets(detector.model, split.train, far, batches=2, seed=3)
    assert found["sets"][0]["distance"] == pytest.approx(expected.distance, rel=1e-5)
    assert found["sets"][0]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["near=few"], "candidates['near']: expected 64 images at least, which make a batch, got 5"),
        (["near=nowhere"], "near: expected digits, photos or KIND:PATH with KIND one of idx, emnist"),
        (["near=stl10:near"], "near: expected digits, photos or KIND:PATH with KIND one of idx, emnist"),
        (["near=python:x"], "near: expected a source that can be read as outliers, got 'python:x'"),
        (["near=digits-multilabel"], "near: expected a source that can be read as outliers"),
        (["near=folder:none"], "folder:none: expected a folder, and none is none"),
        (["near=near", "near=noise"], "near: two sets have that name"),
        (["near"], "near: expected NAME=SOURCE"),
        (["near="], "near=: expected NAME=SOURCE"),
        (["id=near"], "id: expected a name of letters, digits, - and _"),
        (["near=near", "--out", "r/config.yaml"], "[Errno 17]"),
    ],
)
def test_verb_mistakes_are_2_and_one_line(run, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert main(["select-outliers", "r", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"oodkern select-outliers: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images: expected a number from 1 to 9,223,372,036,854,775,807, got 0"),
        (["--images", "63"], "--batch-size: expected a number from 1 to 63, the --images, got 64"),
        (["--batch-size", "0"], "--batch-size: expected a number from 1 to 2,048, the --images, got 0"),
        (["--top", "65"], "--top: expected a number from 1 to 64, the --batch-size and as many singular values as "),
        (["--top", "0"], "--top: expected a number from 1 to 64"),
        (["--top", "17", "--batch-size", "16"], "--top: expected a number from 1 to 16"),
        (["--seed", "-1"], "--seed: expected a number from 0 to 9,223,372,036,854,775,807, got -1"),
        (["--seed", str(2**63)], "--seed: expected a number from 0 to "),
    ],
)
def test_numbers_are_looked_at_before_anything_is_opened(arguments, message, capsys, monkeypatch, tmp_path):
    """There is neither a run nor a set, which is told where the numbers are right."""
    monkeypatch.chdir(tmp_path)
    assert main(["select-outliers", "no-run", "near=nowhere", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"oodkern select-outliers: {message}")
    assert captured.err.count("\n") == 1
    assert main(["select-outliers", "no-run", "near=nowhere"]) == 2
    assert "no-run" in capsys.readouterr().err


def test_verb_tells_of_id_images_that_it_left_out(run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    capsys.readouterr()
    assert main(["select-outliers", "r", "rest=digits"]) == 0
    captured = capsys.readouterr()
    if "multilabel" in (run / "r" / "config.yaml").read_text():  # its canvases are no digits
        assert captured.err == ""
    else:
        assert captured.err == "rest: 1,083 images of the ID set or its classes left out, 714 stay\n"


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["select-outliers", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "  oodkern select-outliers runs/" in printed
    assert "exit codes: 0 done, 2 wrong usage" in printed
    assert max(map(len, printed.splitlines())) <= 120
