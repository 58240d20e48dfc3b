import pytest
import torch

from oodkern.models import ModelConfig, ResNet18, SmallCNN, WideResNet, build_model


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def wide_resnet_parameters(depth, k, in_channels, classes):
    """Counted from the paper's table: convolutions, 1x1 shortcuts where the width changes, two BN a block, the head."""
    n, total, channels = (depth - 4) // 6, 9 * in_channels * 16, 16
    for width in (16 * k, 32 * k, 64 * k):
        for _ in range(n):
            total += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            total += channels * width if channels != width else 0
            channels = width
    return total + 2 * channels + channels * classes + classes


def test_wide_resnet():
    assert count(WideResNet(3, 10)) == wide_resnet_parameters(40, 2, 3, 10) == 2_243_546
    assert count(WideResNet(1, 7, depth=16, widen=4)) == wide_resnet_parameters(16, 4, 1, 7)
    model = WideResNet(3, 10, depth=10, widen=1)
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 64, 8, 8)
    for depth in (41, 4):
        with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 4 .* got {depth}"):
            WideResNet(depth=depth)


def test_resnet18():
    # torchvision's ResNet-18 has 11,689,512 parameters: less its 7x7 stem and 1,000 classes, with the stem of 3x3.
    assert count(ResNet18(3, 10)) == 11_689_512 - (7 * 7 - 3 * 3) * 3 * 64 - (512 + 1) * (1000 - 10)
    model = ResNet18(3, 10, width=4)
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 32, 4, 4)


@pytest.mark.parametrize("model", [SmallCNN(3, 5, 6), WideResNet(3, 5, 10, 1), ResNet18(3, 5, 4)])
def test_logits_are_the_head_of_the_features(model):
    model.eval()
    images = torch.randn(3, 3, 16, 12)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert features.shape == (3, model.fc.in_features)
    torch.testing.assert_close(model.get_classifier()(features), model(images))
    model.train()
    model(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["small_cnn", "wrn_40", "resnet18"])
def test_build(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name, width=1, dropout=0.5), in_channels=1, num_classes=4)
    images = torch.randn(2, 1, 16, 16)
    assert model(images).shape == (2, 4)
    first, second = model(images), model(images)
    assert not torch.equal(first, second), "dropout does nothing"
    model.eval()
    assert torch.equal(model(images), model(images))


def test_pre_activation_blocks_start_as_their_input():
    """With its last convolution at zero a block whose shape does not change is the identity."""
    block = WideResNet(3, 5, 10, 1).backbone[1]
    block.conv2.weight.data.zero_()
    images = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(images), images)


def test_shortcuts_that_change_the_shape_start_from_the_activation():
    """And not from the raw input: the pre-activation is shared, as in the paper's released networks."""
    block = WideResNet(3, 5, 10, 2).backbone[1].eval()
    block.conv2.weight.data.zero_()
    images = torch.randn(2, 16, 8, 8)
    expected = block.shortcut(torch.relu(block.bn1(images)))
    torch.testing.assert_close(block(images), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ModelConfig("resnet"), "model.name: .* resnet18, timm:NAME or torchvision:NAME, got 'resnet'"),
        (ModelConfig(width=-1), "model.width: expected 0"),
        (ModelConfig("timm:resnet18", width=3), "model.width: timm's models have their own"),
        (ModelConfig("torchvision:resnet18", width=3), "model.width: torchvision's models have their own"),
        (ModelConfig("torchvision:resnet18", dropout=0.1), "model.dropout: torchvision's models have their own"),
        (ModelConfig(weights="default"), "model.weights: expected a file for small_cnn, got 'default'"),
        (ModelConfig(dropout=1.0), r"model.dropout: expected a probability in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(options, 3, 10)


def test_small_cnn_rejects():
    with pytest.raises(ValueError, match="num_classes: expected a positive integer, got 0"):
        SmallCNN(num_classes=0)


def test_timm_models():
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = build_model(ModelConfig("timm:resnet18"), in_channels=1, num_classes=4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    assert isinstance(model, timm.models.ResNet)
    with pytest.raises(ValueError, match="timm has no model 'resnet1'"):
        build_model(ModelConfig("timm:resnet1"), 1, 4)


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"model.name: timm:resnet18 needs timm .* pip install 'oodkern\[vision\]'"):
        build_model(ModelConfig("timm:resnet18"), 3, 10)
