"""The local certified radii of a run's score on sets of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oodkern.certificate import certified_radius
from oodkern.data import ImageSet
from oodkern.training.detector import Detector
from oodkern.training.evaluation import SAMPLE, evenly_spaced

QUARTILES = (0.25, 0.5, 0.75)


def certify(detector: Detector, images: ImageSet, limit: int = SAMPLE, batch_size: int = 256) -> dict[str, Any]:
    """Of at most `limit` images: how many are accepted, and the quartiles of the radii on both sides of the threshold.

    `accepted` and `flagged` hold the three quartiles of |threshold - S| / ||grad S||, in the L2 norm of pixels in
    [0, 1], None where no image is on that side; `gradient_norm` those of ||grad S||.
    """
    model, method = detector.model, detector.method

    def score(pixels: Tensor) -> Tensor:
        return method.score(model.outputs(pixels), model.head.weight)

    device = next(model.parameters()).device
    radii, norms = [], []
    for batch in evenly_spaced(len(images), limit).split(batch_size):
        found = certified_radius(score, images.images(batch).to(device), detector.threshold)
        radii.append(found.radius.cpu())
        norms.append(found.gradient_norm.cpu())
    radius = torch.cat(radii)
    inside = radius >= 0
    return {
        "images": len(radius),
        "share_accepted": float(inside.double().mean()),
        "accepted": quartiles(radius[inside]),
        "flagged": quartiles(-radius[~inside]),
        "gradient_norm": quartiles(torch.cat(norms)),
    }


def quartiles(values: Tensor) -> list[float] | None:
    return values.double().quantile(torch.tensor(QUARTILES, dtype=torch.float64)).tolist() if len(values) else None
