"""Several processes choose the same outliers as one does, and resume bit for bit."""

import processes
import pytest
import torch
from training.test_pool import CLUSTERS, FEW
from training.test_resume import check_the_same, same, silent
from training.test_several import Whole, stopped_and_resumed

from oodkern.config import load_config
from oodkern.training import train
from oodkern.training.files import load_checkpoint
from oodkern.training.stage import Stage

OPTIONS = (*FEW, CLUSTERS, "batch_norm=frozen", "epochs=2", "outliers.pool=auto", "outliers.count=40", "threads=1")
CASES = {
    "gregplus": ("outliers.refresh=4",),
    "poem": ("outliers.policy=poem", "outliers.refresh=1", "outliers.extract_every=1"),
    "sharded": ("parallel=fully_shard", "outliers.refresh=epoch", "outliers.policy=ntom"),
}


def chosen_of(options):
    """Trains; of each step the first step and the rows of the choice that it is of."""
    seen, advance = [], Stage.advance

    def note(self):
        parts = advance(self)
        if self.pool is not None:
            seen.append(
                (
                    self.pool.begin,
                    self.pool.rows.sort().values,
                    self.outlier_batches.indices(self.pool.batch_number(self.step - 1)),
                )
            )
        return parts

    Stage.advance = note
    try:
        train(load_config(None, options), log=silent, report=False)
    finally:
        Stage.advance = advance
    return seen


def trained(folder, cases):
    found = {}
    for name, options in cases.items():
        given = [*OPTIONS, *options, f"output={folder}", "optimizer.lr=1e-6"]
        found[name] = chosen_of([*given, f"name={name}-whole"])
        stopped_and_resumed([*given, f"name={name}-stopped"], 13, resume=True)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    two = tmp_path_factory.mktemp("two")
    return two, processes.run(trained, 2, str(two), CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_choose_what_one_does(name, both, tmp_path):
    """At a rate at which rounding does not change the order of energies."""
    threads = torch.get_num_threads()
    options = [one for one in CASES[name] if not one.startswith("parallel")]
    one = chosen_of([*OPTIONS, *options, f"output={tmp_path}", "optimizer.lr=1e-6"])
    torch.set_num_threads(threads)
    first, second = (found[name] for found in both[1])
    assert same(first, second)
    assert len(one) == 20
    assert same(one, first)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_resume_bit_for_bit(name, both):
    folder, _ = both
    check_the_same(folder / f"{name}-stopped", Whole(folder / f"{name}-whole"))
    assert load_checkpoint(folder / f"{name}-whole" / "last.ckpt")["processes"] == 2
