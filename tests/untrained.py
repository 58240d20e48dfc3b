"""Detectors that nobody trained, for what is made of them."""

import torch

from oodkern.classifier import Classifier
from oodkern.config import load_config
from oodkern.detector import Detector
from oodkern.models import build_model

SHAPE = (3, 12, 12)


def detector_of(*words, network=None):
    """A Detector of a model with random weights, its BatchNorm used to images, and a threshold amid their scores."""
    multi_label = "method=edge" in words
    config = load_config(None, [*words, "model.width=4", *["data.name=digits-multilabel"] * multi_label])
    model = Classifier(build_model(config.model, 3, 5), mean=[0.5] * 3, std=[0.3] * 3)
    state = {"classes": list("abcde"), "shape": SHAPE, "threshold": 0.0, "epoch": 1, "stage": config.method}
    detector = Detector(config, {**state, "multi_label": multi_label, "model": model.state_dict()})
    if network is not None:
        detector.model = Classifier(network, mean=[0.5] * 3, std=[0.3] * 3)
    with torch.no_grad():
        detector.model.train()
        for _ in range(20):
            detector.model(torch.rand(16, *SHAPE))
    detector.model.eval()
    with torch.no_grad():  # logits of a few units about 0, so that images have different labels
        detector.model.head.weight *= 10
        detector.model.head.bias -= detector.model(images_of(33)).mean(0) / (1 if network is None else 2)
    detector.threshold = float(detector.predict(images_of(33)).score.median())
    return detector


def images_of(count):
    """Of different colours."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 1, 1, generator=generator) * torch.rand(count, *SHAPE, generator=generator)
