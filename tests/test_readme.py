"""What the README shows is what happens."""

import json
import re

import pytest
import torch
import yaml

from oodkern.cli import main, parse, without_auto
from oodkern.config import load_config
from oodkern.training.comparison import Comparison
from oodkern.verbs.common import file_and_overrides


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(readme, "python")
    assert len(found) == 9
    names: dict = {}
    exec(found[0], names)
    assert (names["energy"].shape, names["energy"].dtype) == ((256,), torch.float32)
    assert names["gradient"].dtype == torch.bfloat16
    assert names["kept"].shape == names["flat"].shape == (256,)
    assert names["gap"].shape == ()
    assert names["best"].result()[1].tolist() == names["energy"].argsort(descending=True)[:10].tolist()
    exec(found[1], names)
    assert all(
        parameter.grad.abs().sum() > 0 for name, parameter in names["network"].named_parameters() if "weight" in name
    )
    exec(found[2], names)
    assert {names[name].shape for name in ("energy", "aligned", "inside", "outside", "contrast")} == {(256,)}
    torch.testing.assert_close(names["scores"].energy, names["energy"])
    assert names["nearest"].index.shape == (256,)
    exec(found[3], names)
    assert set(names["parts"]) == {"ce", "energy_in", "energy_out"}
    exec(found[4], names)
    assert names["apart"].shape == names["value"].shape == ()
    assert names["penalty"].requires_grad
    exec(found[5], names)
    assert (names["logits"].shape, names["features"].shape) == ((2, 10), (2, 128))
    torch.testing.assert_close(names["classifier"].head(names["features"]), names["logits"])
    exec(found[6], names)
    assert torch.equal(names["bank"], names["outliers"].latents)
    assert names["bank"].shape == (6 * 10 * 2, 32)
    assert main(["train", "--quiet", "epochs=1", "pretrain.epochs=1", "model.width=4"]) == 0
    exec(found[7], names)
    assert (len(names["names"]), names["score"].shape, names["is_ood"].dtype) == (5, (3,), torch.bool)
    exec(found[8], names)
    assert {name: one.shape for name, one in names["scores"].items()}.keys() == {"energy", "joint_energy", "msp"}
    assert len(names["index"].unique()) == len(names["index"]) == 500


def test_commands_parse(readme, tmp_path, monkeypatch, capsys):
    """Every `oodkern train ...`, plan and torchrun line resolves to a configuration."""
    (tmp_path / "config.yaml").write_text("method: oe\n")
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0].split() for block in blocks(readme, "sh") for line in block.splitlines()]
    trains = [line[2:] for line in lines if line[:2] == ["oodkern", "train"] and "--help" not in line]
    assert len(trains) == 6
    jobs = [line[line.index("train") + 1 :] for line in lines if line[:1] == ["torchrun"]]
    plans = [line[2:] for line in lines if line[:2] == ["oodkern", "plan"]]
    for arguments in (*jobs, *plans):
        words = parse(without_auto(["train" if arguments in jobs else "plan", *arguments])).words
        assert load_config(*file_and_overrides(words)).method in ("oe", "energy")
    assert (len(jobs), len(plans)) == (1, 2)
    for arguments in trains:
        assert main(["train", "--show", *arguments]) == 0
        resolved = yaml.safe_load(capsys.readouterr().out)
        for key, value in (word.split("=", 1) for word in arguments if "=" in word):
            found = resolved
            for name in key.split("."):
                found = found[name]
            assert str(found) == value


BOTH, ONE = ("auroc", "fpr95_ood_positive"), ("auroc",)
COMPARISONS = {
    "digits-15-splits": BOTH,
    "digits-multilabel-15-splits": BOTH,
    "cifar10-folders": ONE,
    "fashion-mnist": ONE,
    "fashion-mnist-narrow-outliers": ONE,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_comparisons_are_the_stored_ones(readme, root, name):
    """Each table is made of the stored numbers, and they by the command above it."""
    path = f"benches/results/{name}.json"
    stored = json.loads((root / path).read_text())
    call, _ = next(line for line in readme.splitlines() if line.endswith(f" > {path}")).split(" > ")
    assert stored["command"] == call
    found = Comparison(*(stored[key] for key in ("methods", "splits", "seeds", "runs", "data", "multi_label")))
    assert found.summary() == stored["summary"]
    assert f"```\n{found.table(COMPARISONS[name])}\n```" in readme


def test_what_the_readme_says_of_the_comparisons(root):
    """On unseen digits no method is significantly worse than plain training, and those with hinges are better."""
    stored = json.loads((root / "benches/results/digits-15-splits.json").read_text())
    rows = {(row["method"], row["ood"], row["metric"]): row for row in stored["summary"]}
    for method in stored["methods"][1:]:
        near = rows[method, "near", "auroc"]["difference"]
        assert near["low"] <= 0 <= near["high"]
        assert rows[method, None, "accuracy"]["difference"]["mean"] > -0.01
        if method in ("energy", "greg", "gregplus", "separation"):
            assert near["mean"] > 0
        if method != "oal":
            assert rows[method, "far", "auroc"]["mean"] > 0.99
    # By the energy, plain training and OAL find the same of far images.
    far = {
        method: [run["by_score"]["energy"]["far"]["auroc"] for run in stored["runs"] if run["method"] == method]
        for method in ("ce", "oal")
    }
    assert abs(sum(far["ce"]) - sum(far["oal"])) / len(far["ce"]) < 0.02


def test_verbs_that_are_named_exist(readme):
    for verb in set(re.findall(r"`oodkern ([\w-]+)", readme)):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0


def test_files_that_are_named_exist(readme, root):
    for name in re.findall(r"`((?:csrc|oodkern|tests|benches)/[\w/]+(?:\.\w+)?)`", readme):
        assert (root / name).exists(), name
