"""The local certified radii of a run's score on sets of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oodkern.certificate import certified_radius
from oodkern.data import ImageSet
from oodkern.detector import Detector
from oodkern.training.evaluation import SAMPLE, evenly_spaced

QUARTILES = (0.25, 0.5, 0.75)


def certify(detector: Detector, images: ImageSet, limit: int = SAMPLE, batch_size: int = 256) -> dict[str, Any]:
    """Of at most `limit` images: how many are accepted, and the quartiles of the radii on both sides of the threshold.

    `accepted` and `flagged` hold the three quartiles of |threshold - S| / ||grad S||, in the L2 norm of pixels in
    [0, 1], None where no image is on that side and infinite where the gradient is 0; `gradient_norm` those of
    ||grad S||. Images whose radius is NaN are neither accepted nor flagged, and in no quartile: `undefined` is how many
    they are, and is not there where there are none. `share_accepted` is of all images.
    """
    model, method = detector.model, detector.method

    def score(pixels: Tensor) -> Tensor:
        return method.score(model.outputs(pixels), model.head.weight)

    device = next(model.parameters()).device
    radii, norms = [], []
    for batch in evenly_spaced(len(images), limit).split(batch_size):
        seen, _ = images.readable(batch)
        found = certified_radius(score, seen.to(device), detector.threshold)
        radii.append(found.radius.cpu())
        norms.append(found.gradient_norm.cpu())
    return summary(torch.cat(radii), torch.cat(norms))


def summary(radius: Tensor, norm: Tensor) -> dict[str, Any]:
    """What `certify` says of radii [N] and of the norms [N] of their gradients."""
    inside, undefined = radius >= 0, radius.isnan()
    return {
        "images": len(radius),
        "share_accepted": float(inside.double().mean()),
        "accepted": quartiles(radius[inside]),
        "flagged": quartiles(-radius[radius < 0]),
        "gradient_norm": quartiles(norm[~undefined]),
        **({"undefined": int(undefined.sum())} if undefined.any() else {}),
    }


def quartiles(values: Tensor) -> list[float] | None:
    """Each one of the values, the lower of the two that it lies between: a mean of numbers and infinity is neither."""
    if not len(values):
        return None
    return values.double().quantile(torch.tensor(QUARTILES, dtype=torch.float64), interpolation="lower").tolist()


def as_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `certify` found, with "inf" for infinity, which JSON has no number for."""

    def held(value: Any) -> Any:
        if isinstance(value, list):
            return [held(one) for one in value]
        return "inf" if value == math.inf else value

    return {name: held(value) for name, value in found.items()}
