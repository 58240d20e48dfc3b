"""Every recipe loads, makes steps on generated images of its shape, and is what configs/README.md says of it."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from oodkern.config import load_config, read_given
from oodkern.data import ArraySet, OODSplit
from oodkern.data.options import kind_of
from oodkern.methods import METHODS
from oodkern.training import train
from oodkern.training.files import load_checkpoint
from oodkern.training.stage import rate_at
from oodkern.verbs.common import file_and_overrides

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OF_CIFAR = ("oe", "energy", "greg", "gregplus", "separation", "oal", "oal-teacher")
RECIPES = [
    *(f"{data}/{name}" for data in ("cifar10", "cifar100") for name in OF_CIFAR),
    *(f"imagenet1k/{name}" for name in ("oe", "energy", "greg", "gregplus", "separation")),
    *("voc/edge", "coco/edge"),
]
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet1k": 1000, "voc": 20, "coco": 80}
SHAPES = {"oal": (3, 224, 224), "cifar": (3, 32, 32), "imagenet1k": (3, 224, 224), "voc": (3, 256, 256)}
SHAPES["coco"] = SHAPES["voc"]
# Of a ViT-B/16 a step takes many seconds on a CPU; this one has its depth and its patches.
SMALLER = {"timm:vit_base_patch16_224.augreg_in21k_ft_in1k": "timm:vit_tiny_patch16_224"}


def file_of(recipe):
    return CONFIGS / f"{recipe}.yaml"


@functools.cache
def given_by(recipe):
    """The keys that a recipe and its bases give, as YAML alone reads them."""
    return read_given(str(file_of(recipe)))


def at(config, key):
    return functools.reduce(getattr, key.split("."), config)


def library_of(recipe):
    return given_by(recipe).model.name.rpartition(":")[0]


def files_of(path):
    """A recipe and the recipes that it is based on, the nearest last; what begins with _ is none."""
    bases = yaml.safe_load(path.read_text()).get("base", [])
    below = [path.parent / one for one in ([bases] if isinstance(bases, str) else bases)]
    return [*(file for one in below if not one.name.startswith("_") for file in files_of(one)), path]


def inferred_in(recipe):
    """The keys that are marked as inferred, but for those of the data sets, which recipes share."""
    marked = {}
    for path in files_of(file_of(recipe)):
        group = ""
        for line in path.read_text().splitlines():
            found = re.match(r"( *)([\w-]+):", line)
            if found is None:
                continue
            group = group if found[1] else found[2] + "."
            marked[(group if found[1] else "") + found[2]] = "# inferred" in line
    return {key for key, is_inferred in marked.items() if is_inferred}


def test_there_are_no_other_files():
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("_")}
    assert found == {f"{recipe}.yaml" for recipe in RECIPES} | {"cifar10-folders.yaml"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_loads_and_says_where_it_comes_from(recipe):
    config = load_config(str(file_of(recipe)))
    data, _, protocol = recipe.partition("/")
    assert config.method == ("ce" if protocol == "oal-teacher" else protocol)
    assert config.multi_label == (data in ("voc", "coco"))
    for source in (config.data.name, config.data.outliers, *config.data.ood.values()):
        assert kind_of(source)[1].startswith("data/"), source
    assert config.data.ood
    assert file_of(recipe).read_text().startswith("# ")
    whole = "".join(path.read_text() for path in files_of(file_of(recipe)))
    assert re.search(r"\b(ICLR|NeurIPS|ECCV|ICMR|AAAI) 20\d\d\b", whole) or protocol == "oal-teacher"
    for line in whole.splitlines():
        assert len(line) <= 120
        assert line.isascii()
        assert "# inferred" not in line or re.search(r"# inferred: \w", line), line


# What methods.md, the notes on the papers and their code, says that nobody states.
@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("greg", {"optimizer.lr", "pretrain.epochs", "pretrain.lr", "loss.gradient_scale"}),
        ("gregplus", {"optimizer.name", "loss.gradient_scale"}),
        ("separation", {"pretrain.lr"}),
    ],
)
@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_what_no_source_states_is_marked(data, recipe, keys):
    assert inferred_in(f"{data}/{recipe}") == keys


def test_margins_that_no_source_has_are_marked():
    assert "loss.margins" in inferred_in("imagenet1k/energy") & inferred_in("imagenet1k/gregplus")
    assert {"loss.margin_in", "loss.margin_out", "optimizer.name"} <= inferred_in("imagenet1k/greg")
    for recipe in ("cifar10/oe", "cifar10/energy", "cifar100/oe", "cifar100/energy", "imagenet1k/oe"):
        assert inferred_in(recipe) == set()


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        ("cifar10/oe", {0: 0.001, 5: 0.0005, 10: 0}),
        ("cifar10/gregplus", {0: 0.1, 49.99: 0.1, 50: 0.01, 59.99: 0.01}),
        ("cifar100/separation", {0: 0.07, 25: 0.035, 50: 0}),
        ("imagenet1k/greg", {0: 0.01, 50: 0.001, 74.99: 0.001, 75: 0.0001, 90: 0.00001}),
        ("imagenet1k/gregplus", {9.99: 1e-4, 10: 1e-5, 24.99: 1e-5}),
        ("coco/edge", {10: 0.05, 20: 0.1, 60: 0.05, 100: 0}),
    ],
)
def test_rates_at_epochs(recipe, rates):
    config, an_epoch = load_config(str(file_of(recipe))), 1000
    for epoch, rate in rates.items():
        arguments = (round(epoch * an_epoch), config.epochs * an_epoch, round(config.schedule.warmup * an_epoch))
        assert config.optimizer.lr * rate_at(*arguments, config.schedule) == pytest.approx(rate, rel=2e-3, abs=1e-9)


def test_numbers_of_the_sources():
    """Those that one key does not say, or that a default could take the place of."""
    configs = {recipe: load_config(str(file_of(recipe))) for recipe in RECIPES}
    margins = {
        recipe: (one.loss.margin_in, one.loss.margin_out)
        for recipe, one in configs.items()
        if getattr(one.loss, "margins", "") == "fixed"
    }
    greg = {f"{data}/{name}": (-25, -7) for data in ("cifar10", "cifar100") for name in ("greg", "gregplus")}
    assert margins == {
        "cifar10/energy": (-23, -5),
        "cifar100/energy": (-27, -5),
        "imagenet1k/greg": (-25, -7),
        **greg,
    }
    for name, candidates, clusters in (("cifar10", 384, 64), ("cifar100", 384, 64), ("imagenet1k", 1230, 32)):
        one = configs[f"{name}/gregplus"]
        sizes = one.optimizer.batch_size, one.optimizer.outlier_batch_size
        assert METHODS["gregplus"](one.loss).sizes(*sizes) == (candidates, clusters)
    for name in ("voc/edge", "coco/edge"):
        one = configs[name]
        assert one.loss.tail_fraction * one.optimizer.batch_size == 32
        assert one.loss.gap_start * one.epochs == 50
        assert one.batch_norm == "batch"
    reductions = {name: configs[f"{name}/separation"].loss for name in ("cifar10", "imagenet1k")}
    assert reductions["cifar10"].start * configs["cifar10/separation"].epochs == 25
    assert [(one.sep_reduction, one.score_reduction) for one in reductions.values()] == [("sum",) * 2, ("mean",) * 2]
    assert [configs[f"{name}/oal"].loss.rounds for name in ("cifar10", "cifar100")] == [10, 100]


@functools.cache
def generated(data, shape):
    """Random images of a recipe's shape, with the classes of its set."""
    random, classes = torch.Generator().manual_seed(0), CLASSES[data]
    names = [f"class {k}" for k in range(classes)]

    def images(number, labelled=True):
        pixels = torch.randint(256, (number, *shape), generator=random, dtype=torch.uint8)
        labels = torch.arange(number) * (classes // 4)
        if not labelled:
            return ArraySet(pixels, torch.full((number,), -1))
        if data in ("voc", "coco"):
            labels = torch.nn.functional.one_hot(labels, classes).float()
            labels[:, 0] = 1
        return ArraySet(pixels, labels, names)

    known = [images(number) for number in (4, 2, 2)]
    unknown = [images(number, labelled=False) for number in (4, 2, 2)]
    multi_label = data in ("voc", "coco")
    return OODSplit("generated", *known, *unknown[:2], {"far": unknown[2]}, tuple(names), multi_label)


def run_of(recipe, folder, *overrides):
    """Two steps of each stage that the recipe has, with its model and its loss, two images a side."""
    data, given = recipe.partition("/")[0], given_by(recipe)
    few = ["epochs=1", f"pretrain.epochs={min(given.pretrain.epochs, 1)}", "device=cpu", f"output={folder}"]
    few += ["optimizer.batch_size=2", "optimizer.outlier_batch_size=2", "data.workers=0"]
    few += [f"model.name={SMALLER[given.model.name]}"] if given.model.name in SMALLER else []
    few += ["model.weights=''"] if given.model.get("weights") else []  # which are to be downloaded
    few += ["loss.candidates=4", "loss.clusters=1"] if given.method == "gregplus" else []
    few += ["loss.rounds=1"] if given.method == "oal" else []
    config = load_config(str(file_of(recipe)), [*few, *overrides])
    shape = SHAPES["oal" if "oal" in recipe else data.removesuffix("100").removesuffix("10")]
    return train(config, log=lambda line: None, report=False, split=generated(data, shape))


@pytest.mark.parametrize(
    "recipe", [pytest.param(one, id="-".join(filter(None, (one, library_of(one))))) for one in RECIPES]
)
def test_it_trains_on_images_of_its_shape(recipe, tmp_path):
    if library_of(recipe):
        pytest.importorskip(library_of(recipe))
    overrides = []
    if recipe.endswith("/oal"):
        pytest.importorskip("timm")
        run_of(f"{recipe}-teacher", tmp_path)
        overrides = [f"loss.teacher={tmp_path / given_by(recipe).loss.teacher.removeprefix('runs/')}"]
    run = run_of(recipe, tmp_path, *overrides)
    given = given_by(recipe)
    stages = {line["stage"]: line for line in run.history if line["stage"] not in ("decided", "test")}
    assert ("pretrain" in stages) == (given.pretrain.epochs > 0)
    line = stages[given.method]
    assert line["step"] == 2
    assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert line["gradient_norm"] > 0
    before = load_checkpoint(run.folder / "last.ckpt")["baseline"]
    still = [name for name, one in run.model.named_parameters() if torch.equal(one, before[name])]
    assert not still
    if given.method == "edge":
        assert "gap" in line
    if given.method in ("greg", "gregplus"):
        assert line["selected_in"] + line["selected_out"] > 0
    decided = {name: run.decided[name] for name in ("margin_in", "margin_out") if run.decided}
    if given.get("loss", {}).get("margins") == "fixed":
        assert decided == {"margin_in": given.loss.margin_in, "margin_out": given.loss.margin_out}


# configs/README.md.


@pytest.fixture(scope="module")
def readme():
    return (CONFIGS / "README.md").read_text()


def table(text, heading):
    """Rows, by the names of the columns, of the table under a heading."""
    lines = [line for line in text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines() if "|" in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def test_its_table_is_what_the_recipes_say(readme):
    rows = table(readme, "The recipes")
    assert {row["recipe"].strip("`") for row in rows} == set(RECIPES)
    assert len(rows) == len(RECIPES)
    for row in rows:
        recipe = row["recipe"].strip("`")
        config = load_config(str(file_of(recipe)))
        assert set(re.findall(r"`([^`]+)`", row["inferred"])) == inferred_in(recipe), recipe
        keys = [name.strip("`") for name in row if name.startswith("`")]
        assert {"epochs", "pretrain.epochs", "optimizer.lr", "optimizer.batch_size", "model.name"} <= set(keys)
        for key in keys:
            unused = key == "optimizer.outlier_batch_size" and not METHODS[config.method].uses_outliers
            expected = "" if unused or at(config, key) == "" else str(at(config, key))
            said = row[f"`{key}`"].strip("`")
            same = float(said) == at(config, key) if isinstance(at(config, key), float) else said == expected
            assert same, (recipe, key, said, expected)


def test_its_paths_are_those_of_the_recipes(readme):
    named = {path for row in table(readme, "What to put where") for path in re.findall(r"`(data/[^`]+)`", row["path"])}
    used = set()
    for recipe in RECIPES:
        data = load_config(str(file_of(recipe))).data
        for source in (data.name, data.outliers, *data.ood.values()):
            for path in kind_of(source)[1].split("@"):
                found = {one for one in named if path == one or path.startswith(f"{one}/")}
                assert found, (recipe, source)
                used |= found
    assert used == named


def test_its_commands_resolve(readme, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    commands = re.findall(
        r"oodkern (?:train|plan) (.*?)(?: &&|\n)", "".join(re.findall(r"```sh\n(.*?)```", readme, re.S))
    )
    assert len(commands) == 8
    for words in commands:
        config = load_config(*file_and_overrides(words.removesuffix(" --resume auto").split()))
        assert dataclasses.is_dataclass(config)
