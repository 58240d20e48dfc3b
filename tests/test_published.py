"""Models of timm and torchvision, and weights from files and by name."""

import re
from dataclasses import replace

import pytest
import torch

from oodkern import energy, gradient_penalty
from oodkern.classifier import Classifier
from oodkern.config import ConfigError, load_config
from oodkern.data import ArraySet, OODSplit
from oodkern.models import ModelConfig, build_model
from oodkern.published import put, read_state, read_weights
from oodkern.training.start import build_classifier

NETWORKS = {  # and the pixels that the smallest image has
    "resnet18": 32,
    "resnet50": 32,
    "densenet121": 32,
    "vit_b_16": 224,
    "convnext_tiny": 32,
    "swin_t": 32,
    "mobilenet_v3_small": 32,
    "googlenet": 32,
}


def torchvision():
    return pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))


def split_of(channels=3, size=8, classes=4):
    def images(count):
        return ArraySet(
            torch.rand(count, channels, size, size), torch.arange(count) % classes, tuple("abcdefg"[:classes])
        )

    return OODSplit(
        "random", images(8), images(4), images(4), images(8), images(4), {"near": images(4)}, tuple("abcdefg"[:classes])
    )


def network(classes=4, **options):
    return build_model(ModelConfig("resnet18", width=4, **options), 3, classes)


def config_of(*words):
    return load_config(None, ["model.name=resnet18", "model.width=4", *words])


def same(one, other, without=()):
    own = other.state_dict()
    return all(torch.equal(value, own[key]) for key, value in one.state_dict().items() if key not in without)


@pytest.mark.parametrize("wrapped", ["", "state_dict", "model", "module."])
def test_weights_of_a_file(wrapped, tmp_path):
    source, path = network(), tmp_path / "weights.pth"
    state = source.state_dict()
    if wrapped == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({wrapped: state} if wrapped in ("state_dict", "model") else state, path)
    lines = []
    found = build_classifier(config_of(f"model.weights={path}"), split_of(), log=lines.append)
    assert same(source, found.model)
    assert lines == [f"weights: {path}, head and all"]
    plain = build_classifier(config_of(), split_of())
    assert not same(source, plain.model)
    assert found.mean.shape == (3, 1, 1)
    again = build_classifier(config_of(f"model.weights={path}"), split_of(), weights=False)
    assert not same(source, again.model)


def test_weights_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, path = network(), tmp_path / "weights.safetensors"
    safetensors.save_file(source.state_dict(), path)
    assert same(source, build_classifier(config_of(f"model.weights={path}"), split_of()).model)


def test_a_head_of_another_number_of_classes_stays_new(tmp_path):
    source, path = network(classes=7), tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    lines = []
    torch.manual_seed(3)
    found = build_classifier(config_of(f"model.weights={path}"), split_of(), log=lines.append)
    assert same(found.model, source, without=("fc.weight", "fc.bias"))
    torch.manual_seed(3)
    assert torch.equal(found.head.weight, build_classifier(config_of(), split_of()).head.weight)
    assert lines == [f"weights: {path}, with a new head"]
    without = {key: value for key, value in source.state_dict().items() if not key.startswith("fc.")}
    assert put(without, network()) is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.0.weight"), r"they lack backbone\.0\.weight$"),
        (lambda state: state.update(more=torch.ones(1)), "they have besides more$"),
        (
            lambda state: state.update({"backbone.0.weight": torch.ones(5, 3, 3, 3)}),
            r"other shapes backbone\.0\.weight \[5, 3, 3, 3\], not \[4, 3, 3, 3\]$",
        ),
        (lambda state: [state.pop(key) for key in list(state)[1:9]], "they lack .*, .*, .* and 4 more$"),
    ],
)
def test_weights_of_another_model(change, message):
    state = network().state_dict()
    change(state)
    with pytest.raises(ValueError, match=f"model.weights: they are of another model; .*{message}"):
        put(state, network())


def test_files_that_hold_no_weights(tmp_path):
    for content, message in (
        ({"format": 1, "model": {}}, r"is a run's; expected pretrain\.checkpoint="),
        ([1, 2], "expected a state_dict"),
        ({"lr": 0.1}, "expected a state_dict"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    for name, message in (("w.pth", "UnpicklingError|RuntimeError"), ("none.pth", "no such file")):
        with pytest.raises(ConfigError, match=f"model.weights: .*{name}: ?.*({message})"):
            build_classifier(config_of(f"model.weights={tmp_path / name}"), split_of())


def test_without_torchvision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"torchvision:resnet18 needs torchvision .* pip install 'oodkern\[vision\]'"):
        build_model(ModelConfig("torchvision:resnet18"), 3, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_models(name):
    torchvision()
    model = build_model(ModelConfig(f"torchvision:{name}"), 3, 5)
    classifier = Classifier(model).eval()
    images = torch.rand(2, 3, NETWORKS[name], NETWORKS[name])
    logits, features = classifier.outputs(images)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(classifier.head(features), logits)
    torch.testing.assert_close(classifier.features(images), features)
    torch.nn.init.normal_(classifier.head.weight)  # which torchvision's ViT begins with zeros
    if name == "mobilenet_v3_small":  # PyTorch has no second derivative of its hard sigmoid
        return
    gradient_penalty(lambda x: energy(classifier(x)), images, torch.ones(2)).backward()
    assert classifier.head.weight.grad.isfinite().all()
    assert classifier.head.weight.grad.abs().sum() > 0


def test_torchvision_mistakes():
    torchvision()
    for options, channels, message in (
        (ModelConfig("torchvision:resnet1"), 3, "torchvision has no classifier 'resnet1'"),
        (ModelConfig("torchvision:fcn_resnet50"), 3, "torchvision has no classifier"),
        (ModelConfig("torchvision:resnet18"), 1, "torchvision's models take 3 channels, and the images have 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(options, channels, 4)
    with pytest.raises(ConfigError, match="head: SqueezeNet has no linear layer"):
        build_classifier(load_config(None, ["model.name=torchvision:squeezenet1_1"]), split_of())
    with pytest.raises(ConfigError, match=r"model.weights: expected .* one of IMAGENET1K_V1, .* got 'V3'"):
        build_classifier(load_config(None, ["model.name=torchvision:resnet18", "model.weights=V3"]), split_of())


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_torchvision_weights_of_a_file(name, tmp_path):
    found = torchvision()
    source, path = found.models.get_model(name, weights=None), tmp_path / "published.pth"
    state = source.state_dict()
    if name == "densenet121":  # as its published file has them
        state = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in state.items()
        }
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, path)
    lines = []
    config = load_config(None, [f"model.name=torchvision:{name}", f"model.weights={path}"])
    classifier = build_classifier(config, split_of(), log=lines.append)
    head = Classifier(source).head_name
    assert same(classifier.model, source, without=(f"{head}.weight", f"{head}.bias"))
    torch.testing.assert_close(classifier.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(classifier.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    assert lines == [f"weights: {path}, with a new head"]


def test_torchvision_weights_by_name(monkeypatch):
    """Whatever fetches them: the file's tensors, and its mean, deviation and size."""
    found = torchvision()
    source = found.models.get_model("resnet18", weights=None)
    monkeypatch.setattr(
        found.models._api.WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: source.state_dict()
    )
    options = ModelConfig("torchvision:resnet18", weights="IMAGENET1K_V1")
    model = build_model(options, 3, 1000)
    weights = read_weights(options, model)
    assert (weights.size, weights.mean) == (224, (0.485, 0.456, 0.406))
    assert put(weights.state, model) is True
    assert same(source, model)
    lines = []
    config = load_config(None, ["model.name=torchvision:resnet18", "model.weights=default"])
    build_classifier(config, split_of(), log=lines.append)
    assert lines == ["weights: default, with a new head; they were made for 224 pixels a side, not 8"]


def test_torchvision_without_a_network(monkeypatch, tmp_path):
    torchvision()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    config = load_config(None, ["model.name=torchvision:resnet18", "model.weights=default"])
    message = (
        r"model.weights: default of torchvision:resnet18 could not be fetched \(OSError: no network\); fetch \S+pth"
    )
    with pytest.raises(ConfigError, match=message):
        build_classifier(config, split_of())


def test_torchvision_further_heads_are_left_out(tmp_path):
    found = torchvision()
    source, path = found.models.googlenet(init_weights=False), tmp_path / "published.pth"
    torch.save(source.state_dict(), path)
    classifier = build_classifier(
        load_config(None, ["model.name=torchvision:googlenet", f"model.weights={path}"]), split_of(size=32)
    )
    assert torch.equal(classifier.model.conv1.conv.weight, source.conv1.conv.weight)
    assert classifier.model.transform_input
    assert classifier.train()(torch.rand(2, 3, 32, 32)).shape == (2, 4)


def test_torchvision_transformers_take_one_size():
    torchvision()
    with pytest.raises(ConfigError, match=r"data.size: torchvision:vit_b_16 takes images of 224 pixels, got 8"):
        build_classifier(load_config(None, ["model.name=torchvision:vit_b_16"]), split_of())


def test_timm_tags_and_sizes():
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    for name, message in (
        ("resnet18.no_such_tag", "model.name: timm:resnet18.no_such_tag: Invalid pretrained tag"),
        ("vit_tiny_patch16_224", "data.size: timm:vit_tiny_patch16_224 takes images of 224 pixels, got 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_classifier(load_config(None, [f"model.name=timm:{name}"]), split_of())


def test_timm_weights_of_a_file(tmp_path):
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    source, path = timm.create_model("resnet10t"), tmp_path / "published.pth"
    torch.save(source.state_dict(), path)
    config = load_config(None, ["model.name=timm:resnet10t", f"model.weights={path}"])
    classifier = build_classifier(config, split_of())
    assert same(classifier.model, source, without=("fc.weight", "fc.bias"))
    torch.testing.assert_close(classifier.mean.flatten(), torch.tensor(source.pretrained_cfg["mean"]))
    grey = replace(config, model=replace(config.model, weights=""))
    assert build_classifier(grey, split_of(channels=1)).mean.shape == (1, 1, 1)
