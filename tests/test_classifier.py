"""Logits and features of any module: by protocol, by lookup, by hook."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from oodkern.classifier import Classifier
from oodkern.models import SmallCNN


class Plain(nn.Module):
    """Speaks no protocol; its head is under the attribute of that name."""

    def __init__(self, name, head, calls=1):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh())
        setattr(self, name, head)
        self.name, self.calls = name, calls

    def forward(self, images):
        out = features = self.body(images)
        for _ in range(self.calls):
            out = getattr(self, self.name)(features)
        return out


class Getter(Plain):
    def get_classifier(self):
        return self.deep["head"]

    def forward(self, images):
        return self.deep["head"](self.body(images))


def images():
    return torch.rand(4, 3, 2, 2)


def check(classifier):
    """The features are what the head makes the logits of, in one forward pass that changes nothing."""
    given = images()
    output = classifier.outputs(given)
    torch.testing.assert_close(output.logits, classifier(given))
    torch.testing.assert_close(classifier.head(output.features), output.logits)
    upstream = torch.randn_like(output.features)
    grads = torch.autograd.grad(output.features, classifier.parameters(), upstream, allow_unused=True)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), "features are cut off from the graph"
    alone = classifier.features(given)
    torch.testing.assert_close(alone, output.features)
    others = torch.autograd.grad(alone, classifier.parameters(), upstream, allow_unused=True)
    torch.testing.assert_close(others, grads)
    assert torch.equal(classifier(given), output.logits)  # the head is as it was
    assert not classifier.head._forward_hooks


@pytest.mark.parametrize("name", ["fc", "head", "classifier"])
def test_lookup(name):
    classifier = Classifier(Plain(name, nn.Linear(7, 5)))
    assert classifier.head_name == name
    check(classifier)


def test_lookup_takes_the_last_linear_of_a_head_of_several_layers():
    classifier = Classifier(Plain("classifier", nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))))
    assert classifier.head_name == "classifier.2"
    assert classifier.outputs(images()).features.shape == (4, 9)
    check(classifier)


def test_get_classifier_comes_first():
    model = Getter("deep", nn.ModuleDict({"head": nn.Linear(7, 5)}))
    model.fc = nn.Linear(1, 1)  # not what makes the logits
    classifier = Classifier(model)
    assert classifier.head_name == "deep.head"
    check(classifier)


def test_a_head_that_is_named():
    classifier = Classifier(Plain("top", nn.Linear(7, 5)), head="top")
    check(classifier)
    with pytest.raises(ValueError, match=r"head: expected the name of an nn.Linear, one of body.1, top, got 'body'"):
        Classifier(Plain("top", nn.Linear(7, 5)), head="body")
    with pytest.raises(
        ValueError, match=r"head: Plain has no linear layer as fc, head, classifier, heads or of get_classifier"
    ):
        Classifier(Plain("top", nn.Linear(7, 5)))


def test_our_models_speak_the_protocol():
    classifier = Classifier(SmallCNN(3, 5, 4).eval())
    assert classifier.by_protocol
    assert not classifier.head._forward_pre_hooks
    check(classifier)


def test_timm_protocol_and_hook_agree():
    timm = pytest.importorskip("timm", exc_type=ImportError)
    for name in ("resnet18", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"):
        options = {"img_size": 32} if name.startswith("vit") else {}
        model = timm.create_model(name, num_classes=5, **options).eval()
        classifier, hooked = Classifier(model), None
        assert classifier.by_protocol, name
        hooked = Classifier(model, head=classifier.head_name)
        assert not hooked.by_protocol
        given = torch.rand(2, 3, 32, 32)
        for one, other in zip(classifier.outputs(given), hooked.outputs(given), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(classifier(given), classifier.outputs(given).logits)


def test_one_hook_however_often_it_is_used_and_none_after():
    model = Plain("fc", nn.Linear(7, 5))
    with Classifier(model) as classifier:
        for _ in range(5):
            classifier.outputs(images())
            classifier.features(images())
            classifier(images())
        assert len(model.fc._forward_pre_hooks) == 1
    assert not model.fc._forward_pre_hooks
    assert classifier(images()).shape == (4, 5)
    for method in (classifier.outputs, classifier.features):
        with pytest.raises(RuntimeError, match="was closed"):
            method(images())
    classifier.close()  # twice is no harm


def test_features_are_not_kept_alive():
    """A hook that stores features between passes holds a whole graph."""
    classifier = Classifier(Plain("fc", nn.Linear(7, 5)))
    features = weakref.ref(classifier.outputs(images()).features)
    classifier(images())
    gc.collect()
    assert features() is None
    assert not classifier._features


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once(calls):
    classifier = Classifier(Plain("fc", nn.Linear(7, 5), calls))
    with pytest.raises(RuntimeError, match=f"head: expected fc to be called once .* it was called {calls} times"):
        classifier.outputs(images())
    assert not classifier._features


@pytest.mark.parametrize("by_protocol", [True, False])
def test_features_alone_change_the_model_as_logits_do(by_protocol):
    """Running statistics, random numbers; the head makes no logits."""
    found = []
    for call in (Classifier.forward, Classifier.features):
        torch.manual_seed(0)
        model = SmallCNN(3, 5, 4, dropout=0.5)
        classifier = Classifier(model, head=None if by_protocol else "fc")
        assert classifier.by_protocol == by_protocol
        rows = []
        classifier.head.register_forward_hook(lambda head, arguments, logits, rows=rows: rows.append(len(logits)))
        result = call(classifier, torch.rand(4, 3, 8, 8))
        found.append((result, model.state_dict(), torch.get_rng_state()))
    assert sum(rows) == 0
    (logits, buffers, state), (features, other_buffers, other_state) = found
    torch.testing.assert_close(model.fc(features), logits)
    assert torch.equal(state, other_state)
    assert all(torch.equal(buffers[key], other_buffers[key]) for key in buffers)


def test_what_stands_in_for_logits_takes_no_memory():
    """The model goes on with it as with logits, also where it reads their shape."""

    class Viewing(Plain):
        def forward(self, images):
            self.seen = super().forward(images).view(len(images), -1)
            return self.seen

    model = Viewing("fc", nn.Linear(7, 5))
    classifier = Classifier(model)
    with torch.autocast("cpu", torch.bfloat16):
        features = classifier.features(images())
    assert (model.seen.shape, model.seen.dtype, model.seen.untyped_storage().nbytes()) == ((4, 5), torch.bfloat16, 2)
    assert features.shape == (4, 7)


def test_copies_have_hooks_of_their_own():
    model = Plain("fc", nn.Linear(7, 5))
    classifier = Classifier(model)
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    check(other)
    check(classifier)
    other.close()
    check(classifier)


def test_normalisation_travels_with_the_weights():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = Plain("fc", nn.Linear(7, 5))
    classifier = Classifier(model, mean=mean, std=std)
    given = images()
    normalised = (given - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(classifier(given), model(normalised))
    check(classifier)
    again = Classifier(copy.deepcopy(model), mean=(0.0,) * 3, std=(1.0,) * 3)
    again.load_state_dict(classifier.state_dict())
    assert torch.equal(again(given), classifier(given))
    with pytest.raises(ValueError, match="mean, std: expected as many of each, std positive"):
        Classifier(model, mean=(0.0,), std=(0.0,))
