"""What the README shows is what happens."""

import re

import pytest
import torch

from oodkern.cli import main


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_blocks_run(readme):
    found = blocks(readme, "python")
    assert len(found) == 2
    names: dict = {}
    exec(found[0], names)
    assert (names["energy"].shape, names["energy"].dtype) == ((256,), torch.float32)
    assert names["gradient"].dtype == torch.bfloat16
    exec(found[1], names)
    assert set(names["parts"]) == {"ce", "energy_in", "energy_out"}


def test_commands_parse(readme, tmp_path, monkeypatch, capsys):
    """Every `oodkern train ...` line resolves to a configuration."""
    (tmp_path / "config.yaml").write_text("method: oe\n")
    monkeypatch.chdir(tmp_path)
    lines = [line.split("#")[0].split() for block in blocks(readme, "sh") for line in block.splitlines()]
    trains = [line[2:] for line in lines if line[:2] == ["oodkern", "train"] and "--help" not in line]
    assert len(trains) == 2
    for arguments in trains:
        assert main(["train", "--show", *arguments]) == 0
        assert "method: oe" in capsys.readouterr().out


def test_files_that_are_named_exist(readme, root):
    for name in re.findall(r"`((?:csrc|oodkern|tests|benches)/[\w/]+(?:\.\w+)?)`", readme):
        assert (root / name).exists(), name
