"""`oal` in the trainer: its teacher, its synthetic outliers, the parameters of its loss."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stages import DRAWN, batch_of, check_step, smooth, split_of, stage_of

from oodkern.config import ConfigError, load_config
from oodkern.methods.base import generator_of
from oodkern.methods.oal import BANK, first_of_each
from oodkern.synthesis import boundary_outliers, write_bank
from oodkern.training import load_run, train

PLAIN = (*DRAWN, "data.augmentation=none")


def normal_log(value, mean, log_variance):
    return -0.5 * ((value - mean).square() / log_variance.exp() + log_variance + torch.log(torch.tensor(2 * torch.pi)))


def by_hand(stage, teacher):
    """CE + KL of logits + KL of features + CLUB of drawn pairs, all pairs written out; the transfer is the identity."""
    options, loss = stage.config.loss, copy.deepcopy(stage.objective.loss).double()
    model, images, target, _ = batch_of(stage)
    logits, features = model.outputs(images)
    with torch.no_grad():
        taught = copy.deepcopy(teacher).double().eval().outputs(images)
    T = options.temperature
    kl = F.kl_div(
        (logits / T).log_softmax(1), (taught.logits / T).log_softmax(1), reduction="batchmean", log_target=True
    )
    of_features = F.kl_div(
        features.log_softmax(1), taught.features.log_softmax(1), reduction="batchmean", log_target=True
    )
    value = F.cross_entropy(logits, target) + options.weight_logits * T * T * kl + options.weight_features * of_features
    random = generator_of(stage.config.seed, stage.step)
    for q, bank, weight in zip(loss.conditionals, stage.objective.banks, options.weight_mi, strict=False):
        x = bank[torch.randperm(len(bank), generator=random)[: len(images)]].double()
        mean, log_variance = q(x)
        pairs = normal_log(features[None], mean[:, None], log_variance[:, None]).sum(-1)  # [x, h]
        value = value + weight * (pairs.diagonal().mean() - pairs.mean())
    return value, model, loss


def test_the_step(tmp_path):
    """Of two banks; the teacher is the starting model, in evaluation mode."""
    torch.manual_seed(5)
    write_bank(tmp_path / "bank.npy", torch.randn(400, 12))
    options = (*PLAIN, f"loss.bank={tmp_path / 'bank.npy'}", "loss.temperature=2", "loss.weight_mi=[0.4,0.3]")
    stage = stage_of("oal", *options)
    teacher = copy.deepcopy(stage.model)
    assert torch.equal(stage.objective.banks[1], torch.from_numpy(np.load(tmp_path / "bank.npy")))
    for _ in range(3):
        value, model, loss = by_hand(stage, teacher)
        expected = torch.autograd.grad(value, list(loss.parameters()), retain_graph=True)
        parts = check_step(stage, value, model)
        for one, other in zip(stage.objective.loss.parameters(), expected, strict=True):
            torch.testing.assert_close(one.grad.double(), other, rtol=1e-3, atol=1e-5)
    assert {"ce", "distillation", "feature_distillation", "club_1", "club_2"} <= parts.keys()


def test_outliers_are_drawn_at_the_edge_of_the_teachers_features():
    stage = stage_of("oal", *PLAIN, "loss.neighbour=0.5", "loss.boundary=0.2", "loss.sigma=0.1", "loss.rounds=2")
    images = split_of(augmentation="none").train
    with torch.no_grad():
        features = stage.objective.teacher.outputs(images.images(torch.arange(len(images)))).features
    found = boundary_outliers(features, images.labels, generator_of(0, BANK), 0.5, 0.2, 20, 8, 0.1, 2)
    norms = torch.stack([features[images.labels == label].norm(dim=1).mean() for label in range(len(images.classes))])
    expected = found.latents * norms[found.labels, None]
    torch.testing.assert_close(stage.objective.banks[0], expected, rtol=1e-4, atol=1e-5)


def test_outliers_stay_apart_on_their_way_to_the_student():
    """The transfer's BatchNorm is that of the teacher's features: outliers of norm 1 would all come out as one."""
    stage = stage_of("oal", *PLAIN, "loss.contrast=infonce", "loss.transfer=mlp", "epochs=30")
    for _ in range(100):  # running statistics are those of the teacher's features by then
        stage.advance()
    bank = stage.objective.banks[0]

    def cosine(rows):
        rows = rows / rows.norm(dim=1, keepdim=True)
        return float((rows @ rows.T).mean())

    with torch.no_grad():
        mapped = stage.objective.loss.transfer.eval()(bank)
        flat = stage.objective.loss.transfer(bank / bank.norm(dim=1, keepdim=True))
    assert cosine(mapped) < 0.3
    assert cosine(flat) > 0.7


def test_first_of_each_class():
    labels = torch.tensor([2, 0, 2, 2, 1, 0, 0, 2])
    assert first_of_each(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each(labels, 9).tolist() == list(range(8))


@pytest.mark.parametrize("network", ["smooth", "small_cnn"])
def test_a_cached_teacher_is_the_online_one(network):
    """Where images are not augmented. With the images of an augmented stream the two are not the same."""
    model = smooth(split_of()) if network == "smooth" else None
    for options, same in ((PLAIN, True), ((*DRAWN, "data.augmentation=crop"), False)):
        found = []
        for kind in ("cached", "online", "auto"):
            stage = stage_of("oal", *options, f"loss.teacher_outputs={kind}", model=model)
            assert (stage.objective.taught is None) == (kind == "online" or (kind == "auto" and not same))
            found.append([stage.advance()["loss"] for _ in range(3)])
        assert found[2] == pytest.approx(found[0 if same else 1], rel=1e-6)
        assert (found[1] == pytest.approx(found[0], rel=1e-5)) == same


@pytest.mark.parametrize("kind", ["cached", "online"])
def test_the_teacher_is_frozen(kind):
    stage = stage_of("oal", *DRAWN, f"loss.teacher_outputs={kind}", "optimizer.lr=0.5")
    teacher = stage.objective.teacher
    before = copy.deepcopy(teacher.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    while stage.step < stage.steps:
        stage.advance()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(one, before[key]) for key, one in teacher.state_dict().items())
    own = {id(parameter) for parameter in teacher.parameters()}
    assert not own & {id(parameter) for parameter in stage.parameters}
    assert any(not torch.equal(one, before[key]) for key, one in stage.model.state_dict().items())


def test_own_learning_rates():
    """As released: the transfer at 2, CLUB's networks at 0.02 of the student's, on the same schedule."""
    options = ("loss.transfer=mlp", "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.1")
    stage = stage_of("oal", *DRAWN, *options, "schedule.warmup=1")
    loss = stage.objective.loss
    of_group = {id(one): group for group in stage.optimizer.param_groups for one in group["params"]}
    for part, factor in ((stage.model, 1.0), (loss.transfer, 2.0), (loss.conditionals, 0.02)):
        assert {of_group[id(one)]["factor"] for one in part.parameters()} == {factor}
    for step in range(2):
        before = {id(one): one.detach().clone() for one in stage.parameters}
        stage.advance()
        rate = 0.1 * (step + 1) / stage.steps_per_epoch  # of the warm-up
        for part, factor in ((stage.model, 1.0), (loss.transfer, 2.0), (loss.conditionals, 0.02)):
            for one in part.parameters():
                assert of_group[id(one)]["lr"] == pytest.approx(rate * factor)
                torch.testing.assert_close(one.detach(), before[id(one)] - rate * factor * one.grad)
        assert sum(float(one.grad.norm()) for one in loss.parameters()) > 0


def test_contrast_infonce_moves_prototypes():
    stage = stage_of("oal", *DRAWN, "loss.contrast=infonce")
    assert not stage.objective.loss.prototypes.any()
    assert "info_nce" in stage.advance()
    assert stage.objective.loss.prototypes.norm(dim=1).min() > 0
    assert len(stage.optimizer.param_groups) == 1, "nothing but the student is trained"


def silent(line):
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of another architecture, and one of other classes."""
    folder = tmp_path_factory.mktemp("teacher")
    short = ["epochs=1", "pretrain.epochs=2", "method=ce", f"output={folder}"]
    run = train(
        load_config(None, [*short, "model.name=wrn_40", "model.width=1", "name=wide", "data.limit=128"]), silent
    )
    train(load_config(None, [*short, "model.width=4", "name=other", "data.split=3", "data.limit=128"]), silent)
    return run.folder


def test_a_teacher_of_another_architecture(teacher):
    stage = stage_of("oal", *PLAIN, f"loss.teacher={teacher}")
    found = stage.objective.teacher
    assert not found.training
    assert found.head.in_features == 64
    assert stage.objective.loss.transfer_kind == "mlp"
    detector = load_run(teacher)
    assert all(torch.equal(one, found.state_dict()[key]) for key, one in detector.model.state_dict().items())
    images = stage.id_batches.source.images(torch.arange(5))
    with torch.no_grad():
        expected = detector.model.outputs(images)
    torch.testing.assert_close(stage.objective.taught.logits[:5], expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.objective.taught.features[:5], expected.features, rtol=1e-4, atol=1e-5)
    losses = [stage.advance()["loss"] for _ in range(3)]
    assert all(np.isfinite(losses))


def test_a_teacher_of_other_classes_is_refused(teacher):
    with pytest.raises(ConfigError, match=r"other: expected a run on the classes 0, 1, 2, 3, 4, 5 at \(1, 8, 8\), got"):
        stage_of("oal", *PLAIN, f"loss.teacher={teacher.parent / 'other'}")


def test_mistakes_come_before_the_pretraining(teacher, tmp_path):
    """What only the files tell is found out before the first epoch, too."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "bank.npy").write_bytes(b"no array")
    short = [
        "method=oal",
        "epochs=1",
        "pretrain.epochs=1",
        "model.width=4",
        "data.limit=128",
        f"output={tmp_path}/runs",
    ]
    for options, message in (
        ([f"loss.teacher={folder}"], "empty: expected the folder of a run"),
        ([f"loss.teacher={tmp_path / 'none'}"], "loss.teacher: expected the folder of a run, and .*none is none"),
        ([f"loss.teacher={teacher.parent / 'other'}"], "other: expected a run on the classes"),
        ([f"loss.bank={tmp_path / 'none.npy'}"], "loss.bank: no such file: .*none.npy"),
        ([f"loss.bank={tmp_path / 'bank.npy'}"], "bank.npy: expected a .npy file of numbers"),
        ([f"loss.teacher={teacher}", "loss.transfer=identity"], "transfer: 'identity' is for a teacher of the student"),
        (["head=fused"], "head: fused needs a loss with from_features, OALLoss has none"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            train(load_config(None, [*short, *options]), log=silent, report=False)
        assert type(caught.value).__name__ in ("ConfigError", "DataError")
        assert not list((tmp_path / "runs").rglob("last.ckpt")), options


def test_a_run_is_judged_without_its_teacher_and_its_bank(teacher, tmp_path):
    """They are for training: a detector needs neither."""
    import shutil

    shutil.copytree(teacher, tmp_path / "teacher")
    write_bank(tmp_path / "bank.npy", torch.randn(300, 8))
    options = [f"loss.teacher={tmp_path / 'teacher'}", f"loss.bank={tmp_path / 'bank.npy'}", *DRAWN, "data.limit=128"]
    config = load_config(None, ["method=oal", "epochs=1", "pretrain.epochs=1", "model.width=4", *options,
                                f"output={tmp_path}"])  # fmt: skip
    run = train(config, log=silent, report=False)
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "bank.npy").unlink()
    images = run.split.test.images(torch.arange(20))
    torch.testing.assert_close(
        load_run(run.folder).predict(images).score, run.method.scores["id"][:20], rtol=1e-4, atol=1e-5
    )


def test_a_bank_that_is_smaller_than_a_batch(tmp_path):
    """Its outliers are drawn with repetition."""
    write_bank(tmp_path / "bank.npy", torch.randn(5, 7))
    stage = stage_of("oal", *PLAIN, f"loss.bank={tmp_path / 'bank.npy'}")
    assert np.isfinite(stage.advance()["loss"])


def test_the_gradient_of_the_student_is_not_the_teachers():
    """The contrast with weight 0 and distillation with weight 0 leave plain cross-entropy."""
    options = ("loss.weight_mi=[0.0]", "loss.weight_logits=0", "loss.weight_features=0")
    stage = stage_of("oal", *PLAIN, *options)
    model, images, target, _ = batch_of(stage)
    loss = F.cross_entropy(model(images), target)
    check_step(stage, loss, model)


def test_augmented_images_reach_the_online_teacher():
    """The teacher sees the images that the student sees."""
    split = replace(split_of(), augmentation="crop")
    stage = stage_of("oal", *DRAWN, "loss.teacher_outputs=online", split=split)
    value, model, _ = by_hand(stage, copy.deepcopy(stage.model))
    check_step(stage, value, model)
