"""Outliers that are chosen from cached features while the model moves: what a step trains on, and what is an error."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from training.test_resume import silent

from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet
from oodkern.methods import METHODS
from oodkern.pools import POLICIES
from oodkern.pools.extraction import extract
from oodkern.pools.store import FeatureStore
from oodkern.schema import OutlierPoolConfig, policy_of
from oodkern.training import train
from oodkern.training.files import load_checkpoint, read_json_lines
from oodkern.training.pool import PREPARE, SELECT, OutlierPool, head_of, random_numbers
from oodkern.training.random_state import seed_everything
from oodkern.training.stage import Stage
from oodkern.training.start import build_classifier, setting_of

CPU = torch.device("cpu")
FEW = ("pretrain.epochs=0", "model.width=4", "optimizer.outlier_batch_size=16", "data.outlier_augmentation=none")
CLUSTERS = "outliers.clusters=4"
FAST = "optimizer.lr=0.2"  # so that other images are chosen after a step


@pytest.fixture
def pool(short, digits, tmp_path):
    """Of the training outliers, by the model that runs of `short(*FEW)` start from."""
    folder = tmp_path / "pool"
    extract(starting(short(*FEW), digits), digits.outliers, folder, dtype="float32")
    return folder


def starting(config, split):
    seed_everything(config.seed)
    return build_classifier(config, split)


def stage_of(config, split, log=silent):
    """The stage of a run that nothing was trained for, with its pool."""
    split = replace(split, outlier_augmentation="none")
    model = starting(config, split)
    binding = METHODS[config.method](config.loss)
    decided = {"margin_in": -3.0, "margin_out": -1.0}
    objective = binding.objective(decided, setting_of(config, split, starting(config, split), CPU))
    chooser = OutlierPool(config, split, model, log=log)
    return Stage("method", config, split, model, objective, True, CPU, pool=chooser)


def images_in(split, batch):
    """Indices in the training outliers of images [n, C, H, W]."""
    flat, known = batch.flatten(1), split.outliers.images(torch.arange(len(split.outliers))).flatten(1)
    distance, index = torch.cdist(flat.double(), known.double()).min(1)
    assert distance.max() == 0
    return index.sort().values.tolist()


@pytest.mark.parametrize("policy", ["uniform", "gregplus", "ntom", "energy-window", "top-k", "dos", "poem"])
def test_a_step_trains_on_what_the_policy_gives_for_the_current_head(short, digits, pool, policy):
    config = short(*FEW, f"outliers.pool={pool}", f"outliers.policy={policy}", "outliers.refresh=1", CLUSTERS, FAST)
    stage = stage_of(config, digits)
    store = FeatureStore.open(pool)
    stages, heads = [], []
    for step in range(4):
        head = head_of(stage.model)
        heads.append(head[0])
        stage.advance()
        if step == 0:
            known = {"known": stage.pool.known} if policy == "poem" else {}
            prepared = policy_of(config.outliers, **known).prepare(store, head, random_numbers(0, PREPARE, 0))
        expected = prepared.select(store, head, 16, random_numbers(0, SELECT, step))
        assert images_in(digits, stage.batch["outliers"]) == expected.sort().values.tolist()
        stages.append(expected.sort().values.tolist())
    assert not torch.equal(heads[0], heads[3])
    if policy in ("uniform", "gregplus", "poem"):
        assert stages[0] != stages[3]


def test_a_lowest_energy_choice_by_numpy(short, digits, pool):
    config = short(*FEW, f"outliers.pool={pool}", "outliers.policy=top-k", "outliers.refresh=3", "outliers.count=40")
    stage = stage_of(config, digits)
    features = np.load(pool / "shard-00000.npy").astype(np.float64)
    seen = []
    for step in range(6):
        if step % 3 == 0:
            weight, bias = (one.double().numpy() for one in head_of(stage.model))
            energy = -np.log(np.exp(features @ weight.T + bias).sum(1))
            lowest, seen = set(np.argsort(energy, kind="stable")[:40].tolist()), []
        stage.advance()
        seen += images_in(digits, stage.batch["outliers"])
        assert set(seen) <= lowest
    assert len(seen) == 48
    assert len(set(seen)) == 40  # each once in a pass


def test_a_round_of_candidates_is_not_interrupted(short, digits, pool):
    """GReg+ reads candidates of what was chosen, every three steps; a choice that is due waits for the next round."""
    options = ("method=gregplus", "loss.sample_every=3", "loss.clusters=4", "loss.candidates=60", CLUSTERS)
    config = short(*FEW, *options, f"outliers.pool={pool}", "outliers.refresh=2")
    stage = stage_of(config, digits)
    begins, candidates = [], []
    for _ in range(9):
        stage.advance()
        begins.append(stage.pool.begin)
        candidates.append(stage._candidates)
        assert set(images_in(digits, stage.batch["outliers"])) <= set(
            stage.pool.features.images[stage.pool.rows].tolist()
        )
    assert begins == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert len(stage.pool.rows) == 60
    assert candidates[0] is candidates[2]
    assert not torch.equal(candidates[2], candidates[3])


@pytest.mark.parametrize("refresh", ["epoch", "1"])
@pytest.mark.parametrize("policy", ["gregplus", "uniform", "ntom", "poem"])
def test_a_run(short, digits, pool, policy, refresh):
    said = []
    config = short(
        *FEW, f"outliers.pool={pool}", f"outliers.policy={policy}", f"outliers.refresh={refresh}", CLUSTERS, "name=r"
    )
    run = train(config, log=said.append, report=False)
    count = len(digits.outliers)
    assert f"pool {pool}: {count} rows of 8 features; {count} of the {count} outliers to train with have one" in said
    steps = len(digits.train) // 64
    number = 16 if refresh == "1" else 16 * steps
    every = 1 if refresh == "1" else steps
    assert f"pool: {policy} chooses {number} of {count} outliers every {every} steps" in said
    lines = [line for line in read_json_lines(run.folder / "metrics.jsonl") if line["stage"] == "energy"]
    assert len(lines) == 2
    assert all({"pool_energy", "pool_chosen_energy", "pool_seconds"} <= line.keys() for line in lines)
    state = load_checkpoint(run.folder / "last.ckpt")["training"]["pool"]
    assert state["number"] == (1 if refresh == "epoch" else 2 * steps - 1)
    assert len(state["rows"]) == len(set(state["rows"].tolist())) == number
    assert not (run.folder / "pool").exists()
    assert not any("another model" in line for line in said)


def test_features_made_by_the_run_itself_and_made_anew(short, digits):
    """`auto`, every epoch: each folder holds the features of the model as it was then, the last two are kept."""
    options = ("outliers.pool=auto", "outliers.extract_every=1", "outliers.policy=top-k", "epochs=4", "name=r")
    run = train(short(*FEW, *options), log=silent, report=False)
    made = sorted((run.folder / "pool").iterdir())
    assert [path.name for path in made] == ["epoch-2", "epoch-3"]
    two, three = (FeatureStore.open(path) for path in made)
    assert two.fingerprint != three.fingerprint
    every = torch.arange(len(digits.outliers))
    assert len(two) == len(three) == len(every)
    assert not torch.equal(two.rows(every), three.rows(every))
    state = load_checkpoint(run.folder / "last.ckpt")["training"]["pool"]
    assert (state["extraction"], state["features"]["own"]) == (3, "epoch-3")
    assert state["features"]["fingerprint"] == three.fingerprint
    # A fresh run leaves none of them.
    train(short(*FEW, "name=r"), log=silent, report=False, overwrite=True)
    assert not list((run.folder / "pool").glob("*"))


def test_only_images_with_features_are_chosen(short, digits, tmp_path):
    """Of a pool that has other images too, in another order; features are made anew of the same candidates."""
    some = torch.arange(5, len(digits.outliers), 2).flip(0)
    mixed = ArraySet(
        torch.cat([digits.train.array[:7], digits.outliers.array[some]]), torch.zeros(7 + len(some), dtype=torch.int64)
    )
    config = short(
        *FEW, f"outliers.pool={tmp_path / 'mixed'}", "outliers.policy=uniform", "outliers.extract_every=1", "name=r"
    )
    extract(starting(config, digits), mixed, tmp_path / "mixed", shard_rows=50)
    said = []
    stage = stage_of(config, digits, said.append)
    assert f"{7 + len(some)} rows of 8 features; {len(some)} of the {len(digits.outliers)} outliers" in said[0]
    for _ in range(stage.steps_per_epoch + 1):
        stage.advance()
        assert set(images_in(digits, stage.batch["outliers"])) <= set(some.tolist())
    assert stage.pool.features.own == "epoch-1"
    assert sorted(stage.pool.features.images.tolist()) == sorted(some.tolist())
    again = FeatureStore.open(tmp_path / "r" / "pool" / "epoch-1")
    assert len(again) == len(some)


def test_features_of_another_model_are_told(short, digits, pool):
    options = (f"outliers.pool={pool}", "outliers.policy=uniform", "epochs=1")
    for extra in (("seed=1",), ("pretrain.epochs=1",)):
        said = []
        train(short(*FEW, *options, *extra, f"name={extra[0]}"), log=said.append, report=False)
        assert any("its features are of another model" in line for line in said)
        with pytest.raises(ConfigError, match=r"outliers\.policy: poem .* are of another model"):
            train(short(*FEW, *options, *extra, "outliers.policy=poem", f"name=p{extra[0]}"), silent, report=False)


def damaged(name, change):
    def make(pool):
        path = pool / name
        path.write_bytes(change(path.read_bytes()))

    return make


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pool: shutil.rmtree(pool), r"outliers\.pool: .*pool"),
        (damaged("shard-00000.npy", lambda content: content[:-9]), r"outliers\.pool: .*shard-00000\.npy"),
        (damaged("shard-00000.npy", lambda content: content[:-1] + b"\x55"), r"outliers\.pool: .*shard-00000\.npy"),
        (damaged("manifest.json", lambda content: b"{"), r"outliers\.pool: .*manifest\.json"),
    ],
)
def test_a_damaged_pool_is_an_error_before_anything_is_trained(short, pool, spoil, message):
    spoil(pool)
    with pytest.raises(ConfigError, match=message):
        train(short(*FEW, f"outliers.pool={pool}", "pretrain.epochs=1000", "name=r"), silent, report=False)


def test_a_pool_that_does_not_go_with_the_run(short, digits, pool, tmp_path):
    def error(*overrides):
        with pytest.raises(ConfigError) as caught:
            train(short(*FEW, "pretrain.epochs=1000", "name=r", *overrides), silent, report=False)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    given = f"outliers.pool={pool}"
    assert "outliers.pool: expected features of dimension 16, which the model" in error(given, "model.width=8")
    most = len(digits.outliers)
    message = f"outliers.count: expected at most {most} of {most} outliers with features, those that gregplus chooses"
    assert message in error(given, "outliers.count=9999")
    window = (given, "outliers.policy=energy-window", "outliers.low=0.5", "outliers.high=0.75")
    assert f"outliers.count: expected at most {most // 4 + 1} of {most} outliers" in error(*window, "outliers.count=90")
    assert "outliers.quantile: expected a part of the pool to choose from, got none of" in error(
        given, "outliers.policy=ntom", "outliers.quantile=1"
    )
    message = f"outliers.clusters: expected at most {most}, the outliers with features, got 999"
    assert message in error(given, "outliers.clusters=999")
    extract(starting(short(*FEW), digits), digits.train, tmp_path / "known")
    message = error(f"outliers.pool={tmp_path / 'known'}")
    assert f"outliers.pool: expected features of the outliers to train with, {most} images; none of the" in message
    np.save(tmp_path / "plain.npy", np.zeros((5, 8), np.float32))
    assert "outliers.pool: expected the images' keys beside features" in error(
        f"outliers.pool={tmp_path / 'plain.npy'}"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["outliers.policy=gregplu"], "outliers.policy: expected one of uniform, energy-window, ntom, margin, top-k"),
        (["outliers.policy=gregplu"], "got 'gregplu' (did you mean gregplus?)"),
        (["outliers.refresh=0"], "outliers.refresh: expected epoch or a number of steps from 1 on, got '0'"),
        (["outliers.refresh=epochs"], "outliers.refresh: expected epoch or a number of steps from 1 on, got 'epochs'"),
        (["outliers.count=-1"], "outliers.count: expected 0 or more, got -1"),
        (["outliers.extract_every=-2"], "outliers.extract_every: expected 0 or more, got -2"),
        (["outliers.clusters=0"], "outliers.clusters: "),
        (["outliers.policy=margin"], "outliers.threshold: "),
        (["outliers.policy=energy-window", "outliers.low=0.5"], "outliers.low"),
        (["outliers.policy=ntom", "outliers.quantile=1.5"], "outliers.quantile: "),
        (["outliers.policy=top-k", "outliers.score=enrgy"], "outliers.score: expected one of"),
        (["method=ce"], "outliers.pool: expected none, since ce takes no outlier images, got auto"),
        (["method=oal"], "outliers.pool: expected none, since oal takes no outlier images, got auto"),
        (["outliers.polcy=x"], "outliers.polcy: no such key (did you mean outliers.policy?)"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["outliers.pool=auto", *overrides])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choices_without_a_pool():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["outliers.refresh=5"])
    assert str(caught.value) == "outliers.pool: expected features, or auto, for outliers.refresh to count; got none"


def test_policies_have_the_options_that_are_theirs():
    options = OutlierPoolConfig(clusters=3, two_way=False, low=0.1, high=0.2, quantile=0.3, largest=True, threshold=1.5)
    for name, kind in POLICIES.items():
        policy = policy_of(replace(options, policy=name, score="-msp"))
        assert type(policy) is kind
        for key in ("clusters", "low", "high", "quantile", "largest", "threshold"):
            assert getattr(policy, key, getattr(options, key)) == getattr(options, key), (name, key)
        assert getattr(policy, "score", "-msp") == "-msp"


def test_the_score_that_suits_the_labels():
    options = OutlierPoolConfig(policy="ntom")
    assert [policy_of(OutlierPoolConfig(policy=one)).two_way for one in ("dos", "gregplus")] == [False, True]
    assert policy_of(replace(OutlierPoolConfig(policy="gregplus"), two_way=False)).two_way is False
    assert (policy_of(options).score, policy_of(options, multi_label=True).score) == ("energy", "-joint_energy")


def test_a_configuration_of_before(tmp_path):
    """One without the group loads, and chooses nothing."""
    (tmp_path / "config.yaml").write_text("method: oe\nseed: 3\n")
    config = load_config(str(tmp_path / "config.yaml"))
    assert config.outliers.pool == ""
    assert load_config(None, ["outliers.pool=x", "outliers.refresh=500"]).outliers.refresh == "500"
