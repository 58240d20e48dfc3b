"""`edge` in the trainer: when its gap counts, and what a step descends."""

import pytest
import torch
import torch.nn.functional as F
from stages import batch_of, check_step, smooth, split_of, stage_of

from oodkern.config import ConfigError, load_config


def by_hand(stage, beta, tail):
    """BCE + alpha mean softplus + beta gap, all pairs; `tail` gives the ID rows of J and target."""
    options = stage.config.loss
    model, images, target, outliers = batch_of(stage)
    logits = model(torch.cat([images, outliers]))
    known, unknown = logits[: len(images)], logits[len(images) :]
    J, J_out = F.softplus(known).sum(-1), F.softplus(unknown).sum(-1)
    gap = (J_out[:, None] - J[tail(J, target)][None] + options.margin).relu().mean()
    bce = F.binary_cross_entropy_with_logits(known, target.double())
    return bce + options.alpha * F.softplus(unknown).mean() + beta * gap, model


def surest_last(J, target):
    return J.argsort()[: round(0.25 * len(J))]


def test_it_takes_the_multi_label_set_by_itself(tmp_path):
    config = load_config(None, ["method=edge"])
    assert config.data.name == "digits-multilabel"
    assert config.optimizer.name == "adamw"
    assert load_config(None, ["method=edge", "data.name=digits-multilabel"]) == config
    file = tmp_path / "config.yaml"
    file.write_text("method: edge\n")
    assert load_config(str(file)) == config
    for source in ("digits", "folder:/x"):
        with pytest.raises(
            ConfigError, match=r"^method: edge is for multi-label data, and data\.name is single-label$"
        ):
            load_config(None, ["method=edge", f"data.name={source}"])


@pytest.mark.parametrize("network", ["smooth", "small_cnn"])
def test_steps_before_and_after_the_gap_starts(network):
    model = smooth(split_of("digits-multilabel")) if network == "smooth" else None
    stage = stage_of("edge", "loss.beta=0.7", "loss.alpha=0.3", "loss.margin=2", "loss.gap_start=0.5", model=model)
    assert stage.steps == 8
    for step in range(6):
        on = step >= 4  # 4 / 8 is the first share that is 0.5 or more
        loss, copied = by_hand(stage, 0.7 if on else 0.0, surest_last)
        parts = check_step(stage, loss, copied)
        assert ("gap" in parts) == on
        assert stage.objective.loss.separable != on


def test_the_tail_by_frequency():
    """Rows whose rarest label occurs least in the training images; of equal ones those of lower J."""
    stage = stage_of("edge", "loss.tail=frequency", "loss.gap_start=0", model=smooth(split_of("digits-multilabel")))
    counts = stage.id_batches.source.labels.sum(0).double()

    def tail(J, target):
        rarest = torch.where(target > 0, counts, torch.inf).amin(-1)
        rows = sorted(range(len(J)), key=lambda i: (float(rarest[i]), J[i].item()))
        return torch.tensor(rows[: round(0.25 * len(J))])

    check_step(stage, *by_hand(stage, 0.1, tail))


@pytest.mark.parametrize("start", ["0", "1"])
@pytest.mark.parametrize("network", ["smooth", "small_cnn"])
def test_split_forward(network, start):
    """Without BatchNorm the gradients of the joint step; where pairs couple them, parts are forwarded twice."""
    found, sizes = [], []
    for forward in ("false", "true"):
        model = smooth(split_of("digits-multilabel")) if network == "smooth" else None
        stage = stage_of("edge", f"loss.gap_start={start}", f"split_forward={forward}", model=model)
        rows = stage.objective.rows
        stage.objective.rows = lambda model, images, rows=rows: sizes.append(len(images)) or rows(model, images)
        parts = stage.advance()
        found.append((parts, [one.grad.clone() for one in stage.parameters]))
    assert sizes == ([192, 64, 128] if start == "1" else [192, 64, 128, 64, 128])
    same = all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(found[0][1], found[1][1], strict=True)
    )
    assert same == (network == "smooth")


def test_fused_head():
    stages = [stage_of("edge", f"head={head}", "loss.gap_start=0.4") for head in ("full", "fused")]
    for _ in range(4):
        full, fused = (stage.advance() for stage in stages)
        del full["seconds"], fused["seconds"]
        assert fused == pytest.approx(full, rel=2e-4, abs=1e-6)
    for one, other in zip(*(stage.model.parameters() for stage in stages), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
