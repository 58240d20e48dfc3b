"""`head=fused`: losses of features and a head. What that takes of a loss and of a model is checked before training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from oodkern.classifier import Classifier
from oodkern.config import ConfigError

# Of sum_d |x_d w_kd| + |b_k|, which rounding scales with: a few 1e-7 in float32, 5e-4 with TensorFloat-32 products.
TOLERANCE = 1e-3


def check_fused_head(model: Classifier, losses: Iterable[nn.Module], images: Tensor) -> None:
    """Whether a loss of features and head is the loss of the model's logits.

    Looks at a few images, in evaluation mode, and leaves no trace: not in the model, not in the random state.

    Raises ConfigError where a loss has no `from_features`, or the logits are not features @ head.weight.T + head.bias.
    """
    for loss in losses:
        if not hasattr(loss, "from_features"):
            raise ConfigError(f"head: fused needs a loss with from_features, {type(loss).__name__} has none; use full")
    head, was_training = model.head, model.training
    devices = [images.device] if images.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            logits, features = model(images), model.features(images)
    except RuntimeError as error:
        raise ConfigError(f"head: fused cannot take the features of {model.head_name}: {error}; use full") from None
    finally:
        model.train(was_training)
    if features.dim() != 2 or logits.shape != (len(features), len(head.weight)):
        raise ConfigError(
            f"head: fused expects features [N, D] and logits [N, {len(head.weight)}], "
            f"got {list(features.shape)} and {list(logits.shape)}; use full"
        )
    with torch.no_grad():
        bias = None if head.bias is None else head.bias.abs()
        off = (logits - linear(features, head.weight, head.bias)).abs()
        if not (off <= TOLERANCE * linear(features.abs(), head.weight.abs(), bias)).all():  # a NaN is off, too
            raise ConfigError(
                f"head: fused needs a model whose logits are the output of {model.head_name}; "
                f"they differ from features @ weight.T + bias by up to {off.max():.3g}; use full"
            )
