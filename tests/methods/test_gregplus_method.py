"""`gregplus` in the trainer: which outliers a step is made of."""

import copy

import pytest
import torch
from stages import batch_of, energies, stage_of

from oodkern.config import ConfigError, load_config
from oodkern.methods.base import generator_of
from oodkern.pools import cluster_sample

SMALL = ("optimizer.outlier_batch_size=32", "loss.clusters=8")


def watched(stage):
    """The arguments and what came of every choice; the images that are read, by number of the batch."""
    choices, read = [], []
    choose, batches = stage.objective.choose, stage.outlier_batches
    make = type(batches).__getitem__

    def choosing(model, outliers, step):
        chosen = choose(model, outliers, step)
        choices.append((outliers, chosen, copy.deepcopy(model), stage.objective.available.clone()))
        return chosen

    class Reading(type(batches)):
        def __getitem__(self, number):
            read.append(number)
            return make(self, number)

    stage.objective.choose = choosing
    batches.__class__ = Reading
    return choices, read


def eval_outputs(model, images):
    """Features and energies in evaluation mode, of a copy of the model."""
    logits, features = copy.deepcopy(model).eval().outputs(images)
    return features.detach(), energies(logits.detach())


@pytest.mark.parametrize("two_way", [True, False])
def test_a_step_takes_what_cluster_sample_takes(two_way):
    stage = stage_of("gregplus", *SMALL, f"loss.two_way={str(two_way).lower()}", "loss.candidates=150")
    for step in range(3):
        outliers = batch_of(stage)[3].float()
        assert len(outliers) == 150
        expected = cluster_sample(
            *eval_outputs(stage.model, outliers), 32, 8, generator_of(stage.config.seed, step), two_way
        )
        stage.advance()
        assert torch.equal(stage.batch["outliers"], outliers[expected])
        assert len(stage.batch["outliers"]) == 32


def test_defaults_of_the_sizes():
    objective = stage_of("gregplus").objective
    assert (objective.candidates, objective.clusters, objective.count, objective.every) == (384, 64, 128, 1)
    objective = stage_of("gregplus", "optimizer.batch_size=16", "loss.sample_every=3").objective
    assert (objective.candidates, objective.clusters) == (1152, 16)


@pytest.mark.parametrize("options", [("model.dropout=0.5",), ("precision=bf16",), ("loss.sample_every=2",)])
def test_choosing_leaves_no_trace(options):
    """Not in BatchNorm, nor in the random state of dropout; the mode is the stage's, which sets it anew."""
    stage = stage_of("gregplus", *SMALL, *options)
    _, _, outliers = stage.next_batch()
    stage.model.train()
    before, state = copy.deepcopy(stage.model.state_dict()), torch.get_rng_state()
    for step in range(2):
        with stage.autocast():
            chosen = stage.objective.choose(stage.model, outliers, step)
        assert not chosen.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[key]) for key, one in stage.model.state_dict().items())
    stage.advance()
    assert all(module.training for module in stage.model.modules())


def test_a_round_shares_its_candidates():
    """Read every third step; clusters and features of its first; energies of the head of the moment; nothing twice."""
    stage = stage_of("gregplus", *SMALL, "loss.sample_every=3", "optimizer.lr=0.5", "loss.candidates=150")
    choices, read = watched(stage)
    changed = 0
    for step in range(5):
        stage.advance()
        assert read == [0, 1][: step // 3 + 1]
        first, (outliers, chosen, model, available) = choices[step // 3 * 3], choices[step]
        assert outliers is first[0]
        features, _ = eval_outputs(first[2], outliers)
        torch.testing.assert_close(stage.objective.features, features)
        rank = step % 3
        before = choices[step - 1][3] if rank else torch.ones(150, dtype=torch.bool)
        if rank:
            for head, same in ((model.head, True), (first[2].head, False)):
                expected = cluster_sample(
                    None, energies(head(features)).detach(), 32, 8, generator_of(0, step),
                    clustering=stage.objective.cluster, available=before,
                )  # fmt: skip
                if same:
                    assert torch.equal(chosen, outliers[expected])
                changed += not same and not torch.equal(chosen, outliers[expected])
        taken = before & ~available
        assert int(taken.sum()) == 32
        assert int((~available).sum()) == 32 * (rank + 1), "none is taken twice"
    assert changed, "the head's energies chose nothing"


def test_the_seed_chooses():
    """Random numbers are of seed and step alone."""
    found = []
    for seed, noise in ((0, 0), (0, 5), (1, 0)):
        stage = stage_of("gregplus", *SMALL, f"seed={seed}", "loss.clusters=2", "loss.two_way=false")
        stage.objective.seed = seed
        outliers = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(noise)
        found.append([stage.objective.choose(stage.model, outliers, step) for step in range(2)])
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1]), "another step, other numbers"


def test_runs_of_the_same_seed_are_the_same():
    found = []
    for seed in (0, 0, 1):
        stage = stage_of("gregplus", *SMALL, f"seed={seed}", "loss.sample_every=2")
        found.append([stage.advance()["loss"] for _ in range(4)])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss.candidates=127"], r"loss\.candidates: expected 128 or more, the outliers of 1 step\(s\), got 127"),
        (["loss.candidates=300", "loss.sample_every=3"], r"loss\.candidates: expected 384 or more, .* 3 step"),
        (["loss.clusters=385"], r"loss\.clusters: expected at most 384, the candidates, got 385"),
        (["loss.candidates=-1"], r"loss\.candidates: expected 0 or more, got -1"),
        (["loss.clusters=-2"], r"loss\.clusters: expected 0 or more, got -2"),
        (["loss.sample_every=0"], r"loss\.sample_every: expected 1 or more, got 0"),
    ],
)
def test_sizes_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["method=gregplus", *options])


def test_as_many_candidates_as_a_round_takes():
    """All are taken, each once."""
    stage = stage_of("gregplus", *SMALL, "loss.candidates=64", "loss.sample_every=2")
    choices, _ = watched(stage)
    for _ in range(2):
        stage.advance()
    assert not choices[1][3].any()
    taken = torch.cat([choice[1] for choice in choices]).flatten(1)
    assert torch.equal(taken.unique(dim=0), choices[0][0].flatten(1).unique(dim=0))
