"""Models judged, and files written."""

from functools import partial

import pytest
import torch

from oodkern.classifier import Classifier
from oodkern.models import SmallCNN
from oodkern.training import evaluate, files
from oodkern.training.evaluation import logits_of, plain_score
from oodkern.training.files import load_checkpoint


def test_no_half_written_file(tmp_path, monkeypatch):
    """A write that dies leaves the file of before."""
    target = tmp_path / "last.ckpt"
    files.save_checkpoint(target, {"model": torch.ones(3)})
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        files.save_checkpoint(target, {"model": torch.zeros(3)})
    assert torch.equal(load_checkpoint(target)["model"], torch.ones(3))


def test_checkpoints_hold_no_programs(tmp_path):
    torch.save({"format": 1, "model": print}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match=r"Weights only|weights_only"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_evaluation_restores_the_mode(digits):
    model = Classifier(SmallCNN(1, 6, 4))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, digits, "energy", partial(plain_score, "energy"))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sample_of_the_logits_is_evenly_spaced(digits):
    model = SmallCNN(1, 6, 4).eval()
    everything = logits_of(model, digits.train)
    torch.testing.assert_close(logits_of(model, digits.train, limit=7), everything[torch.arange(7) * 644 // 7])
