"""Ways of training that change speed and memory, and not the step."""

import copy

import pytest
import torch
from stages import split_of, stage_of
from torch import nn
from training.test_passes import SHARD, float64, network, processes, stage_by

from oodkern.classifier import Classifier
from oodkern.config import ConfigError, load_config
from oodkern.models import ModelConfig, build_model
from oodkern.processes import Processes, is_sharded
from oodkern.training.memory import StillStatistics, blocks_of


def step(*overrides, method="energy"):
    """Of a small network in float32: what it loses, the gradients and the weights after it."""
    stage = stage_of(method, "model.name=resnet18", "model.width=4", "optimizer.batch_size=16", *overrides)
    parts = stage.advance()
    gradients = [one.grad.clone() for one in stage.parameters]
    return stage, parts["loss"], gradients, [one.detach().clone() for one in stage.parameters]


def assert_close(found, expected, tolerance):
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    for values, others in zip(found[2:], expected[2:], strict=True):
        whole = torch.stack([one.norm() for one in others]).norm()
        for one, other in zip(values, others, strict=True):
            assert (one - other).norm() <= tolerance * torch.maximum(other.norm(), whole / 10)


@pytest.fixture(scope="module")
def plain():
    return step()


def test_channels_last(plain):
    found = step("channels_last=true")
    stage = found[0]
    images, _, outliers = stage.next_batch()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert outliers.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, plain, 1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_implementations_of_the_optimizer(name, implementation):
    expected = step(f"optimizer.name={name}", "optimizer.lr=0.01")
    found = step(f"optimizer.name={name}", "optimizer.lr=0.01", f"optimizer.implementation={implementation}")
    assert all(group[implementation] for group in found[0].optimizer.param_groups)
    assert not any(group["fused"] for group in expected[0].optimizer.param_groups)  # on a CPU, unless asked for
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_backbone(precision):
    """Forward and backward by generated code; and nothing of it is left behind."""
    options = (f"precision={precision}", "model.name=small_cnn", "model.width=4")
    expected, found = step(*options), step(*options, "compile=backbone")
    assert "forward_features" in vars(found[0].model.model)
    assert_close(found, expected, 1e-4 if precision == "fp32" else 5e-2)
    found[0].close()
    assert "forward_features" not in vars(found[0].model.model)


def test_what_cannot_be_compiled():
    with pytest.raises(ConfigError, match="compile: what is compiled cannot be differentiated twice, as greg does"):
        load_config(None, ["method=greg", "compile=backbone"])
    load_config(None, ["method=greg", "compile=backbone", "loss.second_order=finite_difference"])
    with pytest.raises(ConfigError, match="compile: backbone expects a model with forward_features"):
        stage_of("energy", "compile=backbone", model=Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), "1"))

    with pytest.raises(ConfigError, match="checkpoint_activations: expected compile=none beside it"):
        load_config(None, ["checkpoint_activations=true", "compile=backbone"])


def test_checkpointed_blocks_hold_less():
    """Of what is saved for the backward pass: measured where it is saved."""

    def saved(*overrides):
        stage, total = stage_of("energy", "model.name=resnet18", "model.width=4", *overrides), []
        form = stage.objective.loss_of

        def loss_of(*arguments):
            total.append(sum(sizes.values()))
            return form(*arguments)

        stage.objective.loss_of, sizes = loss_of, {}

        def pack(tensor):
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage.advance()
        return total[0]

    assert saved("checkpoint_activations=true") < 0.5 * saved()


def test_blocks():
    def blocks(name):
        model = build_model(ModelConfig(name), 3, 10)
        return [type(one).__name__ for one in blocks_of(model)]

    assert blocks("resnet18") == ["BasicBlock"] * 8
    assert blocks("wrn_40") == ["PreActivationBlock"] * 18
    assert blocks("small_cnn") == []
    with pytest.raises(ConfigError, match="checkpoint_activations: found no blocks in SmallCNN"):
        stage_of("energy", "checkpoint_activations=true")


def test_a_stage_leaves_the_model_as_it_came():
    stage = stage_of("energy", "model.name=resnet18", "checkpoint_activations=true")
    blocks = blocks_of(stage.model.model)
    assert all("forward" in vars(block) for block in blocks)
    stage.close()
    assert not any("forward" in vars(block) for block in blocks)
    copy.deepcopy(stage.model)


def test_a_resumed_stage_goes_on_the_same_way():
    stage = stage_of("energy", "model.name=resnet18", "model.width=4", "checkpoint_activations=true")
    stage.advance()
    stage.load_state_dict(copy.deepcopy(stage.state_dict()))
    assert all("forward" in vars(block) for block in blocks_of(stage.model.model))


def test_still_statistics():
    """Moved inside, even twice at once, and as before outside; a graph that was made before can be sent backward."""
    norm = nn.BatchNorm2d(3)
    images = torch.randn(4, 3, 2, 2, requires_grad=True)
    value = norm(images).square().sum()
    before = copy.deepcopy(norm.state_dict())
    still = StillStatistics(nn.Sequential(norm))
    with still:
        norm(images)
        with still:
            norm(images)
    assert all(torch.equal(one, before[name]) for name, one in norm.state_dict().items())
    value.backward()


def shares_of_each(options):
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    stage = stage_by("energy", *options, of=of)
    stage.advance()
    kept = [one.to_local() if is_sharded(one) else one for one in stage.parameters]
    state = [
        value for one in stage.optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)
    ]
    state = [one.to_local() if is_sharded(one) else one for one in state]
    return sum(one.numel() for one in kept), sum(one.numel() for one in state), sum(map(is_sharded, stage.parameters))


def local_steps(name):
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    with float64():
        stage = stage_by(name, "gather_negatives=false", of=of)
        parts = stage.advance()
    return parts, [one.grad.clone() for one in stage.parameters if one.grad is not None]


class Unused(nn.Linear):
    """A head beside a layer that takes no part."""

    def __init__(self, head):
        super().__init__(head.in_features, head.out_features)
        self.never = nn.Linear(2, 2)


def refused_without_a_part():
    of = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    model = network(split_of(), "group")
    model.model.fc = Unused(model.head)
    stage = stage_of("energy", model=model, split=split_of(), processes=of)
    with pytest.raises(ConfigError, match=r"every parameter .* model\.model\.fc\.never\.weight has none; freeze it"):
        stage.advance()
    model.model.fc.never.requires_grad_(False)
    stage_of("energy", model=model, split=split_of(), processes=of).advance()


def kept_and_local(names):
    refused_without_a_part()
    return [
        shares_of_each(SHARD),
        shares_of_each(("head=fused", "parallel_head=true")),
        [local_steps(n) for n in names],
    ]


LOCAL = ("edge", "oal, cached")


@pytest.fixture(scope="module")
def pair():
    return processes.run(kept_and_local, 2, LOCAL)


def test_each_process_keeps_a_share(pair):
    stage = stage_by("energy")
    total = sum(one.numel() for one in stage.parameters)
    head = sum(one.numel() for one in stage.model.head.parameters())
    for kind, most in ((0, 0.55 * total), (1, total - 0.45 * head)):
        first, second = pair[0][kind], pair[1][kind]
        assert first[2] == (len(stage.parameters) if kind == 0 else 2)
        assert max(first[0], second[0]) <= most
        assert first[0] + second[0] == (total if kind == 0 else 2 * total - head)
        assert (first[1], second[1]) == (first[0], second[0])  # momentum


@pytest.mark.parametrize("i", range(len(LOCAL)))
@float64()
def test_local_negatives(i, pair):
    """Each process's loss is of its own rows, and the mean over the processes counts."""
    name = LOCAL[i]
    found, gradients = pair[0][2][i]
    assert gradients
    assert all(torch.equal(one, other) for one, other in zip(gradients, pair[1][2][i][1], strict=True))
    expected, losses = None, []
    for rank in range(2):
        stage = stage_by(name)
        of = Processes(rank, 2)
        images, target, outliers = stage.next_batch()
        stage.objective.begin(0.0)
        counts = len(target), 0 if outliers is None else len(outliers)
        own, other = (slice(*of.share(count).indices(count)) for count in counts)
        stage.set_training()
        indices = stage.id_batches.indices(0)
        lengths = own.stop - own.start, other.stop - other.start
        outliers = None if outliers is None else outliers[other]
        parts = stage.gradients(images[own], outliers, target[own], indices[own], lengths, 0)
        losses.append(float(parts["loss"]))
        mine = [one.grad / 2 for one in stage.parameters if one.grad is not None]
        expected = mine if expected is None else [a + b for a, b in zip(expected, mine, strict=True)]
    assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-9)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_options_that_do_not_go_together():
    def refused(message, *overrides):
        with pytest.raises(ConfigError, match=message):
            load_config(None, overrides)

    refused("accumulate: expected at most 64, the images of a side, got 65", "accumulate=65")
    refused("accumulate: expected a positive number, got 0", "accumulate=0")
    refused("parallel_head: expected head=fused", "parallel_head=true")
    refused("parallel_head: greg needs all classes", "parallel_head=true", "head=fused", "method=greg")
    refused(
        "parallel_head: expected parallel=ddp beside it", "parallel_head=true", "head=fused", "parallel=fully_shard"
    )
    refused("precision: expected bf16 or fp32 with parallel,", "precision=fp16", "parallel=fully_shard")
    refused("compile: expected one of none, backbone", "compile=all")
    refused("optimizer.implementation: expected one of auto, fused, foreach", "optimizer.implementation=fast")
