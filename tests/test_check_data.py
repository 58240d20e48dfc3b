"""`oodkern check-data`: what it finds in folders with planted faults, what it prints, its page and its exit code."""

import io
import json
import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from clouds import coded, pictures
from PIL import Image

from oodkern.cli import main
from oodkern.data import DataConfig, build_split
from oodkern.data.inspection import SHOWN, inspect

CLASSES = ("n01440764", "n01443537", "n01484850")


def write(path, pixels, quality=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({} if quality is None else {"quality": quality}))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Three ID classes with 12 training and 6 test images each, 20 outliers, 10 OOD images: all clean."""
    monkeypatch.chdir(tmp_path)
    made = pictures(84)
    for i, name in enumerate(CLASSES):
        for k in range(18):
            write(tmp_path / "id" / ("train" if k < 12 else "test") / name / f"{k}.png", made[18 * i + k])
    for k in range(20):
        write(tmp_path / "out" / f"n0209{k % 2}" / f"{k}.png", made[54 + k])
    for k in range(10):
        write(tmp_path / "ood" / f"{k}.png", made[74 + k])
    return tmp_path


ASKED = ("data.name=folder:id", "data.outliers=folder:out", "data.ood.other=folder:ood")


def check(*arguments, code, capsys):
    assert main(["check-data", *ASKED, "--json", "--out", "found", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def duplicates(found):
    """The names of the parts, and for each pair its kind, whether it is mirrored, and its files."""
    return {
        tuple(one["parts"]): [(pair["kind"], pair["mirrored"], *pair["images"]) for pair in one["pairs"]]
        for one in found["findings"]
        if one["kind"] == "duplicates"
    }


def test_clean_sets(sets, capsys):
    found = check(code=0, capsys=capsys)
    assert found["clean"] is True
    assert found["findings"] == []
    assert found["shape"] == [3, 32, 32]
    assert found["left_out"] == {}
    parts = found["parts"]
    assert {name: one["images"] for name, one in parts.items()} == {
        "train": 30, "validation": 6, "test": 18, "outliers": 17, "outlier_validation": 3, "ood.other": 10,
    }  # fmt: skip
    assert all(one["read"] == one["images"] for one in parts.values())
    assert parts["test"]["per_class"] == {"classes": 3, "least": [CLASSES[0], 6], "most": [CLASSES[0], 6]}
    assert json.loads((sets / "found" / "data-check.json").read_text()) == {
        k: v for k, v in found.items() if k != "report"
    }


def test_planted_duplicates(sets, capsys):
    pixels = {name: np.asarray(Image.open(sets / "id" / name)) for name in (
        "test/n01440764/13.png", "test/n01443537/14.png", "test/n01484850/15.png", "test/n01484850/16.png",
    )}  # fmt: skip
    _, second, third, fourth = pixels.values()
    (sets / "out" / "n02090" / "a.png").write_bytes((sets / "id" / "test/n01440764/13.png").read_bytes())
    write(sets / "out" / "n02090" / "b.bmp", second)
    write(sets / "ood" / "c.jpg", third, 70)
    write(sets / "ood" / "d.png", fourth[:, ::-1])
    write(sets / "ood" / "e.png", np.asarray(Image.open(sets / "out" / "n02091" / "1.png")))
    write(
        sets / "id" / "test" / CLASSES[0] / "f.png",
        coded(np.asarray(Image.open(sets / "id/train/n01440764/0.png"))[None], 80)[0],
    )
    found = check("data.validation=0.05", code=2, capsys=capsys)
    pairs = duplicates(found)
    of_outliers = [pairs[key] for key in pairs if key[0].startswith("outlier") and key[1] == "test"]
    assert {(kind, *(path.split("/")[-1] for path in paths)) for one in of_outliers for kind, _, *paths in one} == {
        ("file", "a.png", "13.png"),
        ("pixels", "b.bmp", "14.png"),
    }
    assert set(pairs["ood.other", "test"]) == {
        ("same", False, "ood/c.jpg", "id/test/n01484850/15.png"),
        ("same", True, "ood/d.png", "id/test/n01484850/16.png"),
    }
    assert {pair for key, all_ in pairs.items() if key[1] == "ood.other" for pair in all_} == {
        ("file", False, "out/n02091/1.png", "ood/e.png")
    }
    level = {tuple(one["parts"]): one["level"] for one in found["findings"]}
    assert level["ood.other", "test"] == "error"
    (again,) = [key for key in pairs if key[0] == "test"]
    assert again[1] in ("train", "validation")
    assert level[again] == "warning"
    assert sum(map(len, pairs.values())) == 6
    # Training leaves none of them out: they are other files.
    assert build_split(DataConfig(name="folder:id", outliers="folder:out", ood={"other": "folder:ood"})).dropped == 0


def test_id_pictures_in_two_parts_do_not_fail(sets, capsys):
    source = sets / "id/train/n01440764/0.png"
    (sets / "id" / "test" / CLASSES[0] / "again.png").write_bytes(source.read_bytes())
    found = check(code=0, capsys=capsys)
    assert found["clean"] is True
    assert [(one["level"], one["count"], one["parts"][0]) for one in found["findings"]] == [("warning", 1, "test")]


def test_shared_classes(sets, capsys):
    for k in range(3):
        write(sets / "out" / "N01443537" / f"{k}.png", pictures(3, seed=5)[k])
    found = check(code=0, capsys=capsys)
    assert [(one["level"], one["kind"], one["text"]) for one in found["findings"]] == [
        ("warning", "classes", "folder:out: 1 class is of the ID set too, and left out in training: N01443537")
    ]
    assert found["parts"]["outliers"]["images"] + found["parts"]["outlier_validation"]["images"] == 20
    assert found["left_out"] == {"of 1 classes that the ID set has too": 3}


def test_unreadable_files(sets, capsys):
    (sets / "out" / "n02090" / "0.png").write_bytes(b"no picture")
    found = check(code=0, capsys=capsys)  # one is always allowed
    (one,) = found["findings"]
    assert (one["level"], one["kind"], one["count"]) == ("warning", "unreadable", 1)
    assert one["parts"] == ["outliers", "outlier_validation"]
    assert one["text"].startswith(
        "outliers, outlier validation: 1 of 20 files cannot be read: out/n02090/0.png: not a readable image"
    )
    whole = (sets / "out" / "n02090" / "2.png").read_bytes()
    (sets / "out" / "n02090" / "2.png").write_bytes(whole[:100])
    (sets / "out" / "n02091" / "1.png").write_bytes(b"")
    for workers in (0, 2):
        found = check(f"data.workers={workers}", code=2, capsys=capsys)
        assert [(one["level"], one["count"]) for one in found["findings"]] == [("error", 3)]
        parts = [found["parts"][name] for name in ("outliers", "outlier_validation")]
        assert sum(part["unreadable"] for part in parts) == 3
        assert [part["read"] for part in parts] == [17, 3]


def test_workers_and_limit(sets, capsys):
    alone = check(code=0, capsys=capsys)
    assert check("data.workers=2", code=0, capsys=capsys) == alone
    found = check("--limit", "5", code=0, capsys=capsys)
    assert [one["read"] for one in found["parts"].values()] == [5, 5, 5, 5, 3, 5]
    assert found["parts"]["train"]["images"] == 30
    config = DataConfig(name="folder:id", outliers="folder:out", ood={"other": "folder:ood"})
    assert inspect(config, limit=5).parts["test"].indices.tolist() == [0, 3, 7, 10, 14]


class Page(HTMLParser):
    """Which tags are open, what is asked for, the pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.asked = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.asked += [found[key] for key in ("href", "src") if key in found and not found[key].startswith("data:")]
        if tag == "img":
            kind, content = found["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(np.asarray(Image.open(io.BytesIO(b64decode(content)))))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(sets, capsys):
    planted = np.asarray(Image.open(sets / "id/test/n01440764/13.png"))
    write(sets / "ood" / "<i>&'.png", planted)
    for i in range(30):
        write(
            sets / "ood" / f"more{i}.png", np.asarray(Image.open(sets / f"id/test/{CLASSES[i % 3]}/{12 + i % 6}.png"))
        )
    check(code=2, capsys=capsys)
    text = (sets / "found" / "data-check.html").read_text()
    assert not re.search("<script|<i>|url\\(", text)
    page = Page(text)
    assert page.asked == []
    assert len(page.pictures) == SHOWN
    assert "31 pictures are also in ID test (31 of equal pixels" in text
    assert f"{31 - SHOWN} more are not shown" in text
    assert "&lt;i&gt;&amp;&#x27;.png" in text
    first = page.pictures[0]
    assert first.shape == (32, 65, 3)
    assert (first[:, :32] == first[:, 33:]).all()
    assert (first[:, 32] == 255).all()
    assert any((one[:, :32] == planted).all() for one in page.pictures)


def test_for_people(sets, capsys):
    write(sets / "ood" / "copy.jpg", np.asarray(Image.open(sets / "id/test/n01440764/13.png")), 80)
    assert main(["check-data", *ASKED]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines[0].split() == ["part", "images", "read", "unreadable", "repeated", "flat", "classes", "fewest", "most"]
    assert lines[2].split() == ["ID", "train", "30", "30", "0", "0", "0", "3", "10", CLASSES[0], "10", CLASSES[0]]
    assert (
        "error: OOD other: 1 picture is also in ID test (0 of equal pixels, 1 coded, cut or mirrored otherwise)"
        in lines
    )
    assert any(
        re.match(r"  ood/copy.jpg and id/test/n01440764/13.png: the same picture, \d\.\d+$", one) for one in lines
    )
    assert lines[-3] == "folder:id: 1 error, 0 warnings"
    assert lines[-1] == "The report is runs/check-data/data-check.html"
    assert (sets / "runs" / "check-data" / "data-check.json").is_file()


def test_the_embedded_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check-data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not any(one["kind"] in ("duplicates", "classes", "unreadable") for one in found["findings"])
    assert found["parts"]["train"]["per_class"]["classes"] == 6
    assert main(["check-data", "data.name=digits-multilabel", "--limit", "50"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "-1"], "--limit: expected a number of images, or 0 for all, got -1"),
        (["data.outlier=folder:out"], "data.outlier: no such key"),
        (["data.name=folder:none"], "folder:none: expected a folder, and none is none"),
        (["data.name=python:x"], "data.name: the images of python:x were given by a program"),
        (["data.name=folder:id", "data.ood.near=folder:out", "data.classes=[2,1,1]"], "data.classes: expected three"),
    ],
)
def test_mistakes_are_2_and_one_line(sets, arguments, message, capsys):
    assert main(["check-data", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"oodkern check-data: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_three_images_of_cifar100_are_in_cifar10(real_data, tmp_path, capsys):
    sets = ("cifar10", "cifar100", "dtd", "tinyimagenet")
    done = subprocess.run([sys.executable, real_data / "unpack.py", tmp_path, *sets], capture_output=True)
    assert done.returncode == 0, done.stderr
    ood = {"near": "cifar100", "far": "dtd", "other": "tinyimagenet"}
    asked = [f"data.ood.{name}=folder:{tmp_path / 'ood' / one}" for name, one in ood.items()]
    asked += [f"data.name=folder:{tmp_path / 'cifar10'}", f"data.outliers=folder:{tmp_path / 'outliers/tinyimagenet'}"]
    assert main(["check-data", *asked, "data.workers=2", "--json", "--out", str(tmp_path / "found")]) == 2
    found = json.loads(capsys.readouterr().out)
    errors = [one for one in found["findings"] if one["level"] == "error"]
    pairs = {
        tuple("/".join(path.split("/")[-2:]) for path in pair["images"]) for one in errors for pair in one["pairs"]
    }
    assert pairs == {
        ("bus/01305.jpg", "automobile/09345.jpg"),
        ("cattle/01934.jpg", "dog/03021.jpg"),
        ("pickup_truck/05877.jpg", "truck/19593.jpg"),
    }
    again = sum(one["count"] for one in found["findings"] if one["parts"][0] == "test" and one["kind"] == "duplicates")
    assert again > 35  # of CIFAR-10's own test images in its training images
