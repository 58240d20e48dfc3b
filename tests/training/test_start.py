"""What a run starts from."""

import pytest
import torch

from oodkern.data import ArraySet
from oodkern.training import load_run, train
from oodkern.training.start import statistics


def test_statistics_are_of_images_from_everywhere():
    """A folder comes sorted by class: its first images are of one."""
    images = torch.linspace(0, 1, 5000).view(5000, 1, 1, 1).expand(5000, 2, 3, 3) * torch.tensor([1.0, 0.5]).view(
        1, 2, 1, 1
    )
    mean, std = statistics(ArraySet(images.contiguous(), torch.zeros(5000, dtype=torch.int64)), limit=300)
    assert mean == pytest.approx([0.5, 0.25], abs=0.01)
    assert std == pytest.approx([12**-0.5, 12**-0.5 / 2], abs=0.01)


def test_a_run_is_loaded_to_a_device(short):
    """Whatever it was trained on. The meta device stands for any."""
    run = train(short("epochs=0", "pretrain.epochs=1", "method=ce"), log=lambda line: None, report=False)
    assert {
        one.device.type for one in load_run(run.folder, device=torch.device("meta")).model.state_dict().values()
    } == {"meta"}
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(load_run(run.folder, device="auto").model.parameters()).device.type == auto
