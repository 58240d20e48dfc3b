"""Pictures for tests of duplicates, with as much detail as photographs have at their size."""

import io

import numpy as np
import torch
from PIL import Image


def pictures(count, seed=0, size=32):
    """Clouds with some detail, each of one tint, uint8 [N, size, size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(count, 1, side, side, generator=generator) for side in (4, 8, 16)]
    clouds = sum(
        torch.nn.functional.interpolate(one, (size, size), mode="bicubic") * weight
        for one, weight in zip(layers, (1, 0.7, 0.5), strict=True)
    )
    tint = torch.rand(count, 3, 1, 1, generator=generator) * 0.4 + 0.6
    return ((clouds * 40 + 128) * tint).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def coded(pixels, quality):
    out = []
    for one in pixels:
        file = io.BytesIO()
        Image.fromarray(one).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file).convert("RGB")))
    return np.stack(out)
