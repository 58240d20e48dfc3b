"""`oodkern select`: what it chooses, writes, draws and says of damaged pools and of mistakes."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from oodkern.cli import main
from oodkern.config import load_config
from oodkern.detector import load
from oodkern.pools.policies import POLICIES
from oodkern.pools.scoring import score_pool
from oodkern.pools.store import FeatureStore
from oodkern.report.selection import edges_of, selection_figure, selection_record, selection_table
from oodkern.training import train
from oodkern.verbs.select import POLICIES as OPTIONS
from oodkern.verbs.select import as_line

RUN = ("epochs=1", "pretrain.epochs=1", "model.width=4", "method=ce", "name=r", "threads=1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of plain training on the digits, r, and pools of its outliers, pool, and ID images, known."""
    folder = tmp_path_factory.mktemp("select")
    threads = torch.get_num_threads()
    train(load_config(None, [*RUN, f"output={folder}"]), log=lambda line: None, report=False)
    torch.set_num_threads(threads)
    for word, name in (("outliers", "pool"), ("id", "known")):
        assert main(["extract", str(folder / "r"), word, "--out", str(folder / name), "--shard-rows", "100"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    capsys.readouterr()


def text_of(path):
    return [one.text.strip() for one in ElementTree.parse(path).iter() if one.tag.endswith("}text")]


def selected(*words, code=0):
    assert main(["select", *map(str, words)]) == code


def test_a_choice_from_end_to_end(tmp_path, capsys):
    asked = ["pool", "--policy", "gregplus", "--count", "40", "--clusters", "8", "--seed", "3"]
    selected(*asked, "--out", tmp_path / "new" / "chosen.npy", "--names", tmp_path / "names.txt")
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = np.load(tmp_path / "new" / "chosen.npy")
    assert (rows.dtype, rows.shape, len(set(rows.tolist()))) == (np.int64, (40,), 40)
    pool = FeatureStore.open("pool")
    generator = torch.Generator().manual_seed(3)
    expected = POLICIES["gregplus"](clusters=8).select(pool, pool.head, 40, generator)
    assert rows.tolist() == expected.tolist()
    assert (tmp_path / "names.txt").read_text().splitlines() == pool.keys(expected)
    words = text_of(tmp_path / "new" / "chosen.svg")
    assert f"pool: {len(pool):,} images" in words
    assert "taken: 40 images" in words
    assert "the pool, and what gregplus took of it" in words
    assert "energy (low: in-distribution)" in words
    lines = printed.out.splitlines()
    assert lines[0].split() == ["energy", "rows", "5", "%", "25", "%", "50", "%", "75", "%", "95", "%"]
    energies = score_pool(pool, pool.head, ("energy",))["energy"]
    for line, values in ((lines[2], energies), (lines[3], energies[rows])):
        assert [float(word) for word in line.split()[1:]] == pytest.approx(
            [len(values), *np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])], rel=1e-3
        )
    assert lines[5] == f"gregplus chose 40 of {len(pool)} rows: {tmp_path}/new/chosen.npy"
    assert lines[6] == f"The histograms are in {tmp_path}/new/chosen.svg"
    before = (tmp_path / "new" / "chosen.svg").read_bytes()
    selected(*asked, "--out", tmp_path / "again.npy", "--json", "--plot", tmp_path / "plots" / "p.svg", "--one-way")
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["count"], found["seed"], found["policy"]) == (len(pool), 40, 3, "gregplus")
    assert found["options"] == {"clusters": 8, "two_way": False, "score": "energy", "absent_class": False}
    assert found["plot"] == f"{tmp_path}/plots/p.svg"
    assert (tmp_path / "plots" / "p.svg").exists()
    assert found["scores"]["chosen"]["quantiles"][4] < np.quantile(energies[rows], 0.95)
    selected(*asked, "--out", tmp_path / "new" / "chosen.npy")
    assert (tmp_path / "new" / "chosen.svg").read_bytes() == before


@pytest.mark.parametrize(
    ("policy", "words", "options"),
    [
        ("uniform", [], {}),
        ("energy-window", ["--low", "0.5", "--high", "0.9"], {"low": 0.5, "high": 0.9}),
        ("ntom", ["--quantile", "0.25", "--score", "msp"], {"quantile": 0.25, "score": "msp"}),
        ("margin", [], {"threshold": None}),
        ("margin", ["--threshold", "-1.5"], {"threshold": -1.5}),
        ("top-k", ["--largest", "--score", "max_logit"], {"largest": True, "score": "max_logit"}),
        ("poem", ["--known", "known"], {"known": None}),
        ("dos", ["--clusters", "5"], {"clusters": 5}),
    ],
)
def test_each_policy_as_its_class(policy, words, options, tmp_path):
    pool = FeatureStore.open("pool")
    if "known" in options:
        options = {"known": FeatureStore.open("known")}
    if options.get("threshold", 0) is None:
        options = {"threshold": load("r").threshold}
    expected = POLICIES[policy](**options).select(pool, pool.head, 12, torch.Generator().manual_seed(0))
    selected("pool", "--policy", policy, *words, "--count", 12, "--out", tmp_path / "c.npy", "--run", "r")
    assert np.load(tmp_path / "c.npy").tolist() == expected.tolist()
    assert f"the pool, and what {policy} took of it" in text_of(tmp_path / "c.svg")


def test_a_class_for_outliers(tmp_path, capsys):
    """Of a head with one class more than the ID set has: what is shown is what chose."""
    shutil.copytree("pool", tmp_path / "pool")
    manifest = tmp_path / "pool" / "manifest.json"
    plan = json.loads(manifest.read_text())
    plan["facts"]["classes"].pop()
    manifest.write_text(json.dumps(plan))
    pool, policy = FeatureStore.open("pool"), POLICIES["dos"](clusters=5, absent_class=True)
    expected = policy.select(pool, pool.head, 12, torch.Generator().manual_seed(0))
    words = ("--policy", "dos", "--clusters", 5, "--absent-class", "--count", 12, "--json")
    selected(tmp_path / "pool", *words, "--out", tmp_path / "c.npy")
    assert np.load(tmp_path / "c.npy").tolist() == expected.tolist()
    found = json.loads(capsys.readouterr().out)
    assert (found["pool"], found["score"]) == (f"{tmp_path}/pool", "log p of the absent class")
    quantiles = np.quantile(policy.scores(pool, pool.head), found["scores"]["at"])
    assert found["scores"]["pool"]["quantiles"] == pytest.approx(quantiles.tolist())


def test_every_policy_is_there():
    assert OPTIONS.keys() == POLICIES.keys()


def test_damaged_shards(tmp_path, capsys):
    shutil.copytree("pool", tmp_path / "pool")
    path = tmp_path / "pool" / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    asked = [tmp_path / "pool", "--policy", "uniform", "--out", tmp_path / "c.npy"]
    selected(*asked, "--count", 10, code=2)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"oodkern select: {path}: damaged: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "c.npy").exists()
    selected(*asked, "--count", 10, "--no-verify")
    path.write_bytes(content[:-100])
    selected(*asked, "--count", 10, "--no-verify", code=2)
    assert "shard-00001.npy" in capsys.readouterr().err
    count = len(FeatureStore.open("pool")) - 100
    selected(*asked, "--count", count, "--skip-damaged", "--names", tmp_path / "names.txt", "--json")
    printed = capsys.readouterr()
    assert printed.err.startswith(f"oodkern select: left out, {path}: ")
    assert printed.err.count("\n") == 1
    found = json.loads(printed.out)
    assert found["rows"] == count
    assert len(found["skipped"]) == 1
    rows = np.load(tmp_path / "c.npy")
    assert sorted(rows) == [*range(100), *range(200, count + 100)], "numbers are those of the whole pool"
    assert (tmp_path / "names.txt").read_text().splitlines() == FeatureStore.open("pool").keys(torch.from_numpy(rows))


def test_plain_files(tmp_path, capsys):
    pool = FeatureStore.open("pool")
    features = pool.rows(torch.arange(len(pool)))
    np.save(tmp_path / "plain.npy", features.numpy())
    asked = ["--policy", "top-k", "--count", "9", "--out", tmp_path / "c.npy"]
    selected(tmp_path / "plain.npy", *asked, code=2)
    message = f"--run: {tmp_path}/plain.npy has no head to score with; expected the run whose head does\n"
    assert capsys.readouterr().err == f"oodkern select: {message}"
    selected(tmp_path / "plain.npy", *asked, "--run", "r")
    assert "warning: the features of " in capsys.readouterr().err
    expected = POLICIES["top-k"]().select(pool, pool.head, 9, torch.Generator())
    assert np.load(tmp_path / "c.npy").tolist() == expected.tolist()
    np.save(tmp_path / "wide.npy", features.bfloat16().view(torch.uint16).numpy())
    selected(tmp_path / "wide.npy", *asked, "--run", "r", "--dtype", "bfloat16")
    expected = POLICIES["top-k"]().select(FeatureStore.of(features.bfloat16()), pool.head, 9, torch.Generator())
    assert np.load(tmp_path / "c.npy").tolist() == expected.tolist()
    capsys.readouterr()
    selected(tmp_path / "plain.npy", "--policy", "uniform", "--count", "9", "--out", tmp_path / "u.npy")
    assert capsys.readouterr().out.endswith("No head, and so no scores and no plot: --run\n")
    assert not (tmp_path / "u.svg").exists()
    selected(tmp_path / "plain.npy", *asked, "--names", tmp_path / "n.txt", code=2)
    assert capsys.readouterr().err.endswith("plain.npy has no keys of images\n")
    np.save(tmp_path / "narrow.npy", features[:, :7].numpy())
    selected(tmp_path / "narrow.npy", *asked, "--run", "r", code=2)
    assert "--run: expected a model of 7 features, which" in capsys.readouterr().err


def test_thresholds_and_models_that_do_not_fit(tmp_path, capsys):
    shutil.copytree("pool", tmp_path / "pool")
    manifest = tmp_path / "pool" / "manifest.json"
    asked = [tmp_path / "pool", "--policy", "margin", "--count", "9", "--out", tmp_path / "c.npy"]
    plan = json.loads(manifest.read_text())
    for facts, words, message in (
        ({"score": "msp"}, [], "since the run's score is -msp, and margin goes by energy"),
        ({}, ["--score", "msp"], "since the run's score is energy, and margin goes by msp"),
        ({"temperature": 2.0}, [], "since the run's is at temperature 2"),
        ({"threshold": None}, [], "since the run's score is energy"),
    ):
        manifest.write_text(json.dumps({**plan, "facts": {**plan["facts"], **facts}}))
        selected(*asked, *words, code=2)
        error = capsys.readouterr().err
        assert error.startswith("oodkern select: --threshold: expected a number, ")
        assert message in error
    manifest.write_text(json.dumps({**plan, "facts": {**plan["facts"], "score": "msp"}}))  # whose threshold is of -msp
    selected(*asked, "--score=-msp")
    assert capsys.readouterr().err == ""
    manifest.write_text(json.dumps({**plan, "fingerprint": "0" * 64}))
    selected(*asked, "--run", "r")
    assert capsys.readouterr().err.startswith(
        f"oodkern select: warning: the features of {tmp_path}/pool are of model 000000000000, and r is "
    )
    selected(tmp_path / "pool", "--policy", "poem", "--known", "known", "--count", 1, "--out", tmp_path / "c.npy")
    assert capsys.readouterr().err.endswith("are of different models\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--policy", "uniform", "--clusters", "3"],
            "--clusters: counts with --policy dos, gregplus, got it with ",
        ),
        (["--policy", "dos", "--one-way"], "--one-way: counts with --policy gregplus, got it with dos"),
        (["--policy", "ntom", "--threshold", "1"], "--threshold: counts with --policy margin, got it with ntom"),
        (["--policy", "poem"], "--known: expected a pool of ID images"),
        (["--policy", "ntom", "--quantile", "1.5"], "--quantile: expected 0..1, got 1.5"),
        (["--policy", "ntom", "--quantile", "1"], "--count: expected at most 0, the samples from the quantile on"),
        (
            ["--policy", "top-k", "--score", "odin"],
            "--score: expected one of energy, joint_energy, max_logit, msp",
        ),
        (["--policy", "dos", "--clusters", "0"], "--clusters: expected"),
        (["--policy", "dos", "--clusters", "9999"], "--clusters: expected"),
        (["--policy", "uniform", "--seed", "-1"], "--seed: expected a number from 0 to "),
        (["--policy", "uniform", "--count", "0"], "--count: expected a number from 1 to "),
        (["--policy", "uniform", "--count", "9999"], "--count: expected a number from 1 to "),
        (["--policy", "uniform", "--device", "tpu"], "device: expected"),
        (["--policy", "uniform", "--dtype", "bfloat16"], "pool: expected bfloat16, got float16"),
        (["--policy", "dos", "--absent-class", "--score", "msp"], "--score: expected none beside --absent-class"),
        (["--policy", "dos", "--absent-class"], "--absent-class: expected a head with a class more than the run's "),
        (["--policy", "uniform", "--out", "c.svg"], "--out: expected a name that ends in .npy, got c.svg"),
        (["--policy", "uniform", "--names", "c.npy", "--out", "c.npy"], "--names: expected another file than that of"),
        (["--policy", "uniform", "--names", "."], "--names: expected a file, got the folder ."),
        (["--policy", "uniform", "--name", "x"], "name: expected none"),
    ],
)
def test_mistakes_are_2_and_one_line(words, message, tmp_path, capsys):
    words = words if "--out" in words else [*words, "--out", tmp_path / "c.npy"]
    selected("pool", "--count", "9", *words, code=2)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"oodkern select: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_pool(tmp_path, capsys):
    selected(tmp_path / "none", "--policy", "uniform", "--count", "9", "--out", tmp_path / "c.npy", code=2)
    assert capsys.readouterr().err == f"oodkern select: {tmp_path}/none: no such file or folder\n"


def test_a_figure_has_all_rows():
    scores = np.concatenate([np.linspace(-1, 1, 1000), [1e9, np.nan, np.inf]]).astype(np.float32)
    edges = edges_of(scores[np.isfinite(scores)])
    assert edges[-1] < 2, "one that is far out does not make the others one bin"
    assert edges_of(np.array([1.0, 2.0, 4.0]))[[0, -1]].tolist() == [1, 4]
    assert len(edges_of(np.full(3, 2.0))) == len(edges_of(np.array([]))) == 61
    drawn = selection_figure(scores, scores[:3], "ntom", "msp")
    assert drawn == selection_figure(scores, scores[:3], "ntom", "msp")
    assert all(word in drawn for word in ("pool: 1,003 images", "taken: 3 images", "what ntom took", ">msp<"))
    record = selection_record(scores, np.full(2, np.nan, np.float32))
    assert record["pool"]["quantiles"][2] == pytest.approx(0.001, abs=1e-3)
    assert record["chosen"] == {"rows": 2, "quantiles": [None] * 5}
    assert selection_table(record, "energy").splitlines()[3].split() == ["chosen", "2"]


def test_keys_as_lines():
    assert [as_line(key) for key in ("/a/b c.png", "/ä.png", "a\nb", '"a', "\udcff")] == [
        *("/a/b c.png", "/ä.png", '"a\\nb"', '"\\"a"', '"\\udcff"')
    ]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["select", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "  oodkern select pool --policy gregplus" in printed
    assert all(f"\n  {name} " in printed for name in POLICIES)
    assert "exit codes: 0 done, 2 wrong usage" in printed
    assert max(map(len, printed.splitlines())) <= 120
