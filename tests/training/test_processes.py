"""What processes share and know together."""

import itertools
from dataclasses import replace

import processes
import pytest
import torch
from stages import split_of

from oodkern.config import load_config
from oodkern.data import ArraySet
from oodkern.processes import ALONE, Elsewhere, Processes
from oodkern.training.evaluation import scored
from oodkern.training.random_state import random_state
from oodkern.training.start import build_classifier

CPU = torch.device("cpu")


def test_shares_are_everything_once():
    for total in (0, 1, 2, 7, 64):
        for count in (1, 2, 3, 5):
            parts = [list(range(total))[Processes(rank, count).share(total)] for rank in range(count)]
            assert list(itertools.chain(*parts)) == list(range(total))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ALONE.share(5) == slice(0, 5)


def exchanged():
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rows = torch.arange(22.0).view(11, 2)
    own = rows[of.share(11)]
    chosen = torch.tensor([10, 3, 0, 7, 8, 1, 2])
    assert torch.equal(of.gather(own), rows)
    assert torch.equal(of.take(own, chosen, 11), rows[chosen][of.share(7)])
    assert torch.equal(of.take(own, torch.tensor([0]), 11), rows[:1][of.share(1)])
    assert of.most(of.rank * 3, CPU) == 3 * (of.count - 1)
    means = [torch.full((2, 3), float(of.rank)), torch.tensor(4.0 * of.rank, dtype=torch.float64)]
    of.mean_(means)
    assert means[0].eq((of.count - 1) / 2).all()
    assert means[1] == 2 * (of.count - 1)
    assert of.objects(of.rank) == list(range(of.count))
    with pytest.raises(KeyboardInterrupt):
        of.once(interrupted)
    with pytest.raises(ZeroDivisionError if of.first else Elsewhere):
        of.once(lambda: 1 / 0)
    few = Counted(torch.rand(2, 1, 8, 8), torch.arange(2))
    model = build_classifier(load_config(None, ["model.width=4"]), replace(split_of(), train=few, classes=("0", "1")))
    alone = scored(model, few, {"": lambda outputs, weight: outputs.logits[:, 0]})
    shared = scored(model, few, {"": lambda outputs, weight: outputs.logits[:, 0]}, processes=of)
    torch.testing.assert_close(shared.logits, alone.logits)
    torch.testing.assert_close(shared.scores, alone.scores)
    return of.once(lambda: of.rank)


class Counted(ArraySet):
    """Images that, like files, cannot be read none at a time."""

    def images(self, indices):
        return torch.stack([self.array[i] for i in indices.tolist()])


def interrupted():
    raise KeyboardInterrupt


def test_new_processes_draw_numbers_of_their_own(short, digits):
    from oodkern.training.state import State

    config, drawn = short("name=r", "seed=4294967295"), []
    for rank in range(4):
        State(config, digits, None, Processes(rank, 4)).set_random_state({"random": random_state()})
        drawn.append(torch.rand(3).tolist())
    assert len({tuple(one) for one in drawn}) == 4


def test_exchange():
    assert processes.run(exchanged, 3) == [0, 0, 0]
