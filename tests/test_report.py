"""The page of a run: complete, self-contained, and shown as meant by a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from oodkern.config import load_config
from oodkern.report.plots import bin_edges, roc_points
from oodkern.tables import evaluation_rows
from oodkern.training import train

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module", params=["digits", "digits-multilabel"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    short = ["epochs=2", "pretrain.epochs=3", "model.width=8"]
    return train(load_config(None, [f"output={folder}", f"data.name={request.param}", *short]), log=lambda line: None)


@pytest.fixture(scope="module")
def page(run):
    return (run.folder / "report.html").read_text()


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def test_is_well_formed_and_asks_for_nothing(page):
    elements = Elements(page)
    assert not elements.open
    assert not [tag for tag, _ in elements.found if tag in ("script", "link", "iframe", "object")]
    for tag, attributes in elements.found:
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), (tag, name)
    assert "url(" not in page
    assert "@import" not in page
    figures = [attributes for tag, attributes in elements.found if tag == "img" and attributes.get("class") == "figure"]
    assert len(figures) == 6
    assert all(len(attributes["alt"]) > 20 for attributes in figures), "figures are told to those who cannot see them"


def test_holds_the_numbers_and_the_settings(run, page):
    text = " ".join("".join(Elements(page).text).split())
    for name, one in (("baseline", run.best_baseline), (run.config.method, run.method)):
        for row in evaluation_rows(name, one):
            assert f">{row[4]}</td>" in page
            assert f">{row[6]}</td>" in page
    for line in (
        "method: energy",
        "epochs: 2",
        f"outlier_batch_size: {run.config.optimizer.outlier_batch_size}",
        "margin_in: -",
        "torch: ",
    ):
        assert line in text
    assert f"{run.threshold:.4g}" in text
    for name in ("OOD, near", "OOD, far", "Outliers trained with", "ID, hardest to accept"):
        assert name in text


def test_the_hardest_images_are_the_hardest(run, page):
    strip = page.split("OOD, near")[1].split("<h3>")[0]
    shown = [float(value) for value in re.findall(r"<span>(-?[\d.]+)</span>", strip)]
    lowest = run.method.scores["near"].sort().values[: len(shown)]
    assert shown == pytest.approx(lowest.tolist(), abs=0.006)
    assert len(shown) == 24
    accepted = int((run.method.scores["near"] <= run.threshold).sum())
    assert f"{accepted:,} of {len(run.method.scores['near'])} accepted" in strip
    assert strip.count("class='wrong'") == min(accepted, 24)
    known = page.split("ID, hardest to accept")[1].split("<h2>")[0]
    shown = [float(value) for value in re.findall(r"<span>(-?[\d.]+)</span>", known)]
    assert shown[0] == pytest.approx(float(run.method.scores["id"].max()), abs=0.006)


def test_the_same_run_gives_the_same_figures(run, page):
    import matplotlib

    from oodkern.report import plots

    with matplotlib.rc_context(plots.STYLE):
        assert plots.roc_curves(run) == plots.roc_curves(run)


def test_roc_points_are_scikit_learns():
    generator = np.random.default_rng(0)
    known, unknown = generator.integers(0, 30, 200), generator.integers(10, 45, 150)
    flagged, found = roc_points(known, unknown)
    labels = np.r_[np.zeros(200), np.ones(150)]
    fpr, tpr, _ = roc_curve(labels, np.r_[known, unknown], drop_intermediate=False)
    np.testing.assert_allclose(flagged, fpr)
    np.testing.assert_allclose(found, tpr)


def test_bins_of_constant_scores():
    edges = bin_edges(np.full(9, 3.0))
    assert edges[0] < 3 < edges[-1]


def browser():
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip(f"no browser: the page is not rendered (looked for {', '.join(BROWSERS)})")
    return found


MEASURE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const table = document.querySelector("table").getBoundingClientRect();
  document.title = JSON.stringify({
    images: images.length,
    broken: images.filter((i) => !i.complete || i.naturalWidth === 0).length,
    hidden: images.filter((i) => i.getBoundingClientRect().width < 40).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    table: table.width,
    height: document.documentElement.scrollHeight,
  });
});
</script></body>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(run, page, tmp_path, width):
    """Every image loads and is seen, and nothing sticks out, on a desk and on a narrow window."""
    import json

    measured = tmp_path / "measured.html"
    measured.write_text(page.replace("</body>", MEASURE))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [browser(), *options, f"--window-size={width},900", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", measured.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)
    found = json.loads(title.replace("&quot;", '"'))
    assert found["images"] == page.count("<img")
    assert found["broken"] == 0
    assert found["hidden"] == 0
    assert found["overflow"] <= 0
    assert found["table"] > min(width, 900) * 0.7

    # And it is painted: every figure has its colours on the picture of the page.
    picture = tmp_path / "page.png"
    size = f"--window-size={width},{found['height']}"
    subprocess.run([browser(), *options, size, f"--screenshot={picture}", (run.folder / "report.html").as_uri()],
                   capture_output=True, timeout=120, check=True)  # fmt: skip
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int).reshape(-1, 3)
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):  # ID, near, far
        assert (np.abs(pixels - colour).max(1) < 12).sum() > 150, colour
