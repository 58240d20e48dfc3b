"""The page of a comparison: its numbers are the summary's, its marks are right, and it asks for nothing."""

import base64
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text

from oodkern.cli import main
from oodkern.report.comparison import write_comparison
from oodkern.report.comparison_plots import bounds, coloured, common, label, printable, verdict
from oodkern.tables import percent
from oodkern.training.comparison import Comparison, signed

ODD = ("$x^2$ <script>alert(\"1\")</script> & 'q'", "_hidden\x07\n测试", "a long name of an OOD set " * 4, "{0} %s \\n")
EIGHT = ["ce", "oe", "energy", "edge", "oal", "greg", "greg_plus", "separation"]
SHOWN = ("auroc", "fpr95_ood_positive", "fpr95_id_positive")


def metrics(auroc, fpr=None):
    fpr = 1 - auroc if fpr is None else fpr
    return {"auroc": auroc, "aupr_out": auroc, "fpr95_ood_positive": fpr, "fpr95_id_positive": fpr}


def random_comparison(methods, splits, seeds=(0,), sets=("near", "far")):
    generator = np.random.default_rng(0)
    found = Comparison(list(methods), list(splits), list(seeds))
    for split in splits:
        for seed in seeds:
            for method in methods:
                scores = ("msp", "energy") if method == "ce" else ("energy",)
                judged = {
                    name: {ood: metrics(*generator.uniform((0.7, 0.1), (0.99, 0.6))) for ood in sets} for name in scores
                }
                environment = {"torch": "2.13.0", "threads": 2 + seed, "gpu": None}
                decided = {} if method == "ce" else {"margin_in": -3.14159 - seed}
                found.runs.append(
                    {
                        "method": method,
                        "split": split,
                        "seed": seed,
                        "accuracy": float(generator.uniform(0.9, 1)),
                        "by_score": judged,
                        "environment": environment,
                        "decided": decided,
                    }
                )
    return found


class Tables(HTMLParser):
    """Elements, and the cells of every table as lists of their pieces of text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.tables, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if ("td" in self.open or "th" in self.open) and data.strip():
            self.tables[-1][-1][-1].append(data.strip())


def written(comparison, folder):
    path = folder / "comparison.html"
    assert write_comparison(comparison, path, "oodkern compare --methods a,b") == path
    assert [one.name for one in folder.iterdir()] == ["comparison.html"]
    return path.read_text(encoding="utf-8")


def drawings(page):
    encoded = re.findall(r"src='data:image/svg\+xml;base64,([^']*)'", page)
    return [ElementTree.fromstring(base64.b64decode(one)) for one in encoded]


def words(drawing):
    return ["".join(one.itertext()) for one in drawing.iter("{http://www.w3.org/2000/svg}text")]


def test_shows_the_numbers_of_the_summary(tmp_path):
    found = random_comparison(["ce", "oe", "energy"], range(5), (0, 1))
    found.data = "folder:/a&b"
    page = written(found, tmp_path)
    tables = Tables(page).tables
    matrix = tables[0]
    assert matrix[0] == [["method"], ["ID accuracy"], ["near"], ["far"]]
    assert matrix[1] == [["AUROC"], ["FPR95"], ["FPR95(ID+)"]] * 2
    rows = {(row["method"], row["ood"], row["metric"]): row for row in found.summary()}
    asked = [(None, "accuracy"), *((ood, metric) for ood in ("near", "far") for metric in SHOWN)]
    for line, method in zip(matrix[2:], found.methods, strict=True):
        assert line[0][0] == method
        for cell, (ood, metric) in zip(line[1:], asked, strict=True):
            row = rows[method, ood, metric]
            assert cell[0] == percent(row["mean"])
            difference = row["difference"]
            if method == "ce":
                assert len(cell) == 1
            else:
                texts = [text for text in cell[1:] if text not in ("better", "worse")]
                interval = f"{signed(difference['low'])} .. {signed(difference['high'])}"
                assert texts == [signed(difference["mean"]), interval]
    text = "".join(Tables(page).text)
    assert found.table() in text
    for piece in ("oodkern compare --methods a,b", "folder:/a&b", "5 (0 to 4)", "2 (0, 1)", "over 5 splits", "2.13.0"):
        assert piece in text
    runs = tables[1]
    assert runs[0][3:] == [["ID accuracy"], ["AUROC near"], ["AUROC far"], ["threads"], ["margin_in"]]
    assert len(runs) == 1 + 30
    for run, line in zip(found.runs, runs[1:], strict=True):
        judged = run["by_score"]
        near, far = (judged[found.score_of(run["method"], ood)][ood]["auroc"] for ood in ("near", "far"))
        told = [run["method"], str(run["split"]), str(run["seed"]), *map(percent, (run["accuracy"], near, far))]
        decided = [] if run["method"] == "ce" else [f"{-3.14159 - run['seed']:.4g}"]
        assert line == [*([one] for one in told), [str(2 + run["seed"])], decided]


def test_marks_what_the_intervals_show(tmp_path):
    """AUROC up is better, FPR95 up is worse, accuracy down is worse; an interval that holds 0 shows nothing."""
    found = Comparison(["ce", "better", "worse", "unclear"], list(range(4)), [0])
    wobble = (0.001, -0.001, 0.002, -0.002)
    shifts = {"ce": (0, 0, 0), "better": (0.1, -0.1, 0.01), "worse": (-0.1, 0.1, -0.01), "unclear": (0, 0, 0)}
    for split in range(4):
        for method, (auroc, fpr, accuracy) in shifts.items():
            noise = 0 if method == "ce" else wobble[split]
            one = {"near": metrics(0.8 + auroc + noise, 0.4 + fpr + noise)}
            run = {"method": method, "split": split, "seed": 0, "accuracy": 0.95 + accuracy + noise}
            found.runs.append({**run, "by_score": {"msp": one}, "decided": {}})
    matrix = Tables(written(found, tmp_path)).tables[0]
    marks = {line[0][0]: [[t for t in cell if t in ("better", "worse")] for cell in line[1:]] for line in matrix[2:]}
    assert marks == {
        "ce": [[]] * 4,
        "better": [["better"]] * 4,
        "worse": [["worse"]] * 4,
        "unclear": [[]] * 4,
    }
    # And the figure: green dots, orange squares, hollow dots, in the order of the methods.
    for drawing in drawings((tmp_path / "comparison.html").read_text())[:2]:
        text = ElementTree.tostring(drawing, encoding="unicode")
        used = re.findall(r"<\w+:use [^>]*style=\"fill: (#\w+)", text)
        assert [colour for colour in used if colour in ("#009e73", "#d55e00", "#ffffff")] == [
            "#009e73", "#d55e00", "#ffffff",
        ]  # fmt: skip


def test_verdicts_on_the_edge():
    assert verdict({"low": 0.0, "high": 0.1}, True) == ""
    assert verdict({"low": -0.1, "high": 0.0}, False) == ""
    assert verdict({"low": 1e-9, "high": 0.1}, True) == "better"
    assert verdict({"low": 1e-9, "high": 0.1}, False) == "worse"
    assert verdict({"low": -0.1, "high": -1e-9}, False) == "better"
    assert verdict({"low": None, "high": None}, True) == ""
    assert verdict(None, True) == ""


def check_self_contained(page):
    elements = Tables(page)
    assert not [tag for tag, _ in elements.found if tag in ("script", "link", "iframe", "object", "a", "form")]
    for tag, attributes in elements.found:
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert "href" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    for attributes in (attributes for tag, attributes in elements.found if tag == "img"):
        assert len(attributes["alt"]) > 20, "figures are told to those who cannot see them"
    for drawing in drawings(page):
        for element in drawing.iter():
            assert element.tag.split("}")[1] not in ("script", "image", "foreignObject")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith("#")
    return elements


@pytest.mark.parametrize(
    ("methods", "splits", "seeds", "sets"),
    [
        (["ce"], [None], [0], ["near"]),
        (["ce"], [0, 1], [0], ["near", "far"]),
        (["ce", "energy"], [None], [0], ["near", "far"]),
        (["ce", "energy"], [3], [0, 1], ["near"]),
        (EIGHT, range(6), [0], ["near", "far", "textures"]),
        (["ce", "energy"], [0, 1], [0], ODD),
    ],
)
def test_all_kinds_of_comparisons(tmp_path, recwarn, methods, splits, seeds, sets):
    found = random_comparison(methods, splits, seeds, sets)
    page = written(found, tmp_path)
    elements = check_self_contained(page)
    assert page == written(found, tmp_path), "the same bytes"
    assert not recwarn.list
    matrix = elements.tables[0]
    assert [line[0][0] for line in matrix[2:]] == methods
    assert [cell[0] for cell in matrix[0][2:]] == [printable(ood).strip() for ood in sets]
    shown, n = drawings(page), len(sets)
    assert len(shown) == (n if len(methods) == 1 else 4 * n)
    units = len(splits) if len(splits) > 1 else len(seeds)
    assert (" .. " in "".join(" ".join(cell) for line in matrix for cell in line)) == (units > 1 and len(methods) > 1)
    # Every figure names the methods, and its OOD set as far as there is room.
    for i, drawing in enumerate(shown[-n:]):
        told = words(drawing)
        assert set(methods) <= set(told)
        assert any(word.startswith(printable(sets[i])[:20]) for word in told)


def test_multi_label_says_map(tmp_path):
    found = random_comparison(["ce", "energy"], [0, 1])
    found.multi_label = True
    page = written(found, tmp_path)
    assert Tables(page).tables[0][0][1] == ["ID mAP"]
    assert any("ID mAP, percent" in words(drawing) for drawing in drawings(page))


def test_seeds_of_a_split_are_one_dot(tmp_path):
    """Of 3 splits and 2 seeds, 3 dots a method, at the means of the seeds."""
    found = random_comparison(["ce", "energy"], range(3), (0, 1))
    spread = ElementTree.tostring(drawings(written(found, tmp_path))[4], encoding="unicode")
    at, means = [], []
    for method, colour in (("ce", "#444444"), ("energy", "#0072b2")):
        uses = re.findall(r"<\w+:use [^>]*>", spread)
        dots = [use for use in uses if f'style="fill: {colour}; fill-opacity' in use]
        assert len(dots) == 3
        at += [float(re.search(r' x="([-\d.]+)"', dot).group(1)) for dot in dots]
        means += np.mean(np.reshape(found.values(method, "near", "auroc"), (3, 2)), axis=1).tolist()
    slope, start = np.polyfit(means, at, 1)
    assert slope > 0
    np.testing.assert_allclose(at, start + slope * np.array(means), atol=0.01)


def test_names_in_the_trade_off_cover_nothing():
    """Eight points in a heap in the corner, and still each name has a place: on no name, on no point, in the axes."""
    from oodkern.report import plots

    figures, axes = plots.panels(3.5)
    points = {name: (90 + 0.01 * i, 80 + 0.01 * (i % 3)) for i, name in enumerate(EIGHT)}
    axes[0].set_xlim(89.6, 90.08)
    axes[0].set_ylim(79.8, 80.03)
    label(axes[0], points, coloured(EIGHT))
    figures[0].draw_without_rendering()
    assert [text.get_text() for text in axes[0].texts] == EIGHT
    boxes = [Text.get_window_extent(text).extents for text in axes[0].texts]
    places = [axes[0].transData.transform(point) for point in points.values()]
    room = axes[0].get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(common(box, other) for other in boxes[:i])
        assert not any(common(box, (*(place - 3), *(place + 3))) for place in places)
        assert room.x0 <= box[0] < box[2] <= room.x1
        assert room.y0 <= box[1] < box[3] <= room.y1


def test_axes_are_not_stretched_by_noise():
    assert bounds([99.33919, 99.33920]) == pytest.approx((98.839195, 99.839195))
    assert bounds([10, 20]) == pytest.approx((8.4, 21.6))
    assert common((0, 0, 2, 2), (1, 1, 3, 5)) == 1
    assert common((0, 0, 2, 2), (3, 3, 4, 4)) == 0


def test_the_verb_writes_it(tmp_path, capsys):
    short = ["epochs=1", "pretrain.epochs=1", "model.width=4", f"output={tmp_path / 'runs'}"]
    assert main(["compare", "--methods", "energy", "--splits", "2", *short, "--json"]) == 0
    captured = capsys.readouterr()
    path = tmp_path / "runs" / "comparison.html"
    assert captured.err.splitlines()[-1] == f"the page is {path}"
    assert captured.out.startswith("{"), "for programs, nothing else"
    text = unescape(path.read_text())
    assert f"oodkern compare --methods energy --splits 2 {' '.join(short)} --json" in text
    assert "data set <b>digits</b>" in text
