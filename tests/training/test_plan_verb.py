"""`oodkern plan`: what it prints, and what it refuses."""

import json

import pytest
import torch

from oodkern.cli import main
from oodkern.config import ConfigError, load_config
from oodkern.training.plan import WAYS, plan

NET = ("model.name=resnet18", "model.width=8")


def test_what_cannot_be_foretold_is_an_error():
    config = load_config(None, ["data.limit=400"])
    with pytest.raises(ConfigError, match=r"--memory: expected room for one image a step at least, .* 20,000 bytes"):
        plan(config, memory=20_000)
    with pytest.raises(ConfigError, match="method: edge is for multi-label data"):
        plan(config, ["edge"])
    with pytest.raises(ConfigError, match=r"--methods: expected of ce, .*, got 'energi' \(did you mean energy\?\)"):
        plan(load_config(None, ["device=cuda:99"]), ["energi"])  # before any work
    with pytest.raises(ConfigError, match=r"loss.second_order: finite_difference expects a smooth network"):
        plan(load_config(None, ["method=greg", "loss.second_order=finite_difference", "data.limit=400"]))
    with pytest.raises(ConfigError, match="checkpoint_activations: the model has no blocks"):
        plan(load_config(None, ["checkpoint_activations=true", "data.limit=400"]))
    with pytest.raises(ConfigError, match=r"optimizer.batch_size: 1 does not make a step: Expected more than 1 value"):
        plan(load_config(None, ["method=ce", "optimizer.batch_size=1", "data.limit=400", *NET]))
    beside = plan(load_config(None, ["method=ce", "optimizer.batch_size=3", "data.limit=100", *NET]))
    assert beside.cells["ce"]["accumulate=2"].reason.startswith("optimizer.batch_size: 3 does not make a step")
    assert beside.cells["ce"]["accumulate=4"].reason.startswith("accumulate: expected at most 3")


def test_the_verb(capsys, monkeypatch):
    assert main(["plan", "--methods", "all", "data.limit=400", "model.width=8", "batch_norm=sync"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 150
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith(("energy", "ce", "oal", "greg"))]
    assert rows == ["energy", "ce", "greg", "gregplus", "oal"]
    assert "activations and work" in printed
    assert "- checkpoint_activations: the model has no blocks" in printed
    assert "- batch_norm=sync: this is the step of one process with the whole batch" in printed
    without = not torch.cuda.is_available()
    assert ("Nothing was measured" in printed, "it is the CPU's step that is counted" in printed) == (without, without)
    assert "Largest" not in printed or torch.cuda.is_available()
    assert main(["plan", "method=ce", "data.limit=400", "--memory", "6MiB"]) == 0
    largest = capsys.readouterr().out.partition("Largest optimizer.batch_size in 6.0 MiB, with 128 outliers to 64")[2]
    assert [line.split()[0] for line in largest.splitlines() if line.startswith(("energy", "ce"))] == ["ce"]
    assert main(["plan", "data.limit=400", "--memory", "80"]) == 2
    assert capsys.readouterr().err.startswith("oodkern plan: --memory: expected a positive number with TiB")
    assert main(["plan", "--methods", ","]) == 2
    assert capsys.readouterr().err.startswith("oodkern plan: --methods: expected names with commas")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == "oodkern plan: foretells the step of one process; expected no torchrun\n"


def test_the_verb_for_programs(capsys):
    assert main(["plan", "--json", "data.name=digits-multilabel", "data.limit=200", "--memory", "1GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["memory"], list(found["methods"])) == ("energy", 10**9, ["energy"])
    ways = found["methods"]["energy"]
    assert list(ways) == list(WAYS)
    one = ways["as configured"]
    assert sum(one["peak"]["kinds"].values()) == one["peak"]["bytes"]
    assert 0 < one["proposal"]["bytes"] <= 10**9
    assert ways["checkpoint_activations"] == {
        "peak": None,
        "reason": "checkpoint_activations: the model has no blocks",
        "proposal": None,
    }
