"""`batch_norm=frozen`: fine-tuning with the starting model's statistics."""

import pytest
import stages
import torch

from oodkern.losses import ClassificationLoss
from oodkern.methods import Objective
from oodkern.training.stage import Stage

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["energy", "gregplus"])
def test_frozen_batch_norm_keeps_its_statistics(method):
    """In fine-tuning alone; the statistics that it normalises by are the starting model's, its weights are trained."""
    for kind, same in (("batch", False), ("frozen", True)):
        stage = stages.stage_of(method, f"batch_norm={kind}")
        before = {key: value.clone() for key, value in stage.model.state_dict().items()}
        for _ in range(2):
            stage.advance()
        after = stage.model.state_dict()
        running = [key for key in before if "running" in key]
        assert running
        assert all(torch.equal(before[key], after[key]) == same for key in running)
        assert stage.model.training
        assert not torch.equal(before["model.backbone.1.weight"], after["model.backbone.1.weight"])
    pretraining = Stage(
        "pretrain", stage.config, stages.split_of(), stage.model, Objective(ClassificationLoss()), False, CPU
    )
    pretraining.advance()
    assert not torch.equal(stage.model.state_dict()[running[0]], before[running[0]])
