"""Curves for TensorBoard."""

import pytest

from oodkern.training import train


def test_tensorboard(short, monkeypatch):
    """Curves of both stages, and none twice where a run goes on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from oodkern.training.trainer import Trainer

    save = Trainer.save

    def die(self, stage):
        if stage.kind == "method" and stage.epoch == 2:
            self.board.close()
            raise OSError("killed after the epoch was logged, before it was saved")
        save(self, stage)

    monkeypatch.setattr(Trainer, "save", die)
    with pytest.raises(OSError, match="killed"):
        train(short("name=r"), log=lambda line: None, report=False)
    monkeypatch.setattr(Trainer, "save", save)
    run = train(short("name=r"), log=lambda line: None, report=False, resume=True)
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    lines = [r for r in run.history if "epoch" in r]
    for stage, offset in (("pretrain", 0), ("energy", 20)):
        expected = [(offset + r["step"], r["loss"]) for r in lines if r["stage"] == stage]
        shown = {event.step: event.value for event in events.Scalars(f"{stage}/loss")}
        assert shown == pytest.approx(dict(expected))
