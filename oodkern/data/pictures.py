"""Image files to tensors: what a file holds, and how the whole of it becomes `size` x `size`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodkern._errors import brief


class DataError(Exception):
    """What is wrong with a data set on disk, in one line that names the file."""


def open_picture(file: Any, channels: int, name: str) -> Any:
    """The Pillow image of a path or an open file, grey for 1 channel and RGB for 3; transparency is ignored.

    Raises DataError with the name where it is none.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)  # as cameras mean it to be seen
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.mode == "F":
                raise DataError(f"{name}: expected 8 or 16 bits a pixel, got floating-point numbers")
            return image.convert("L" if channels == 1 else "RGB")
    except DataError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to spell
        raise DataError(f"{name}: not a readable image ({brief(error)})") from None


def fitted(picture: Any, size: int, resize: str = "stretch") -> Any:
    """A Pillow image as `size` x `size` pixels, bilinear with antialiasing.

    "stretch" resizes the whole picture whatever its sides. "center-crop" brings the shorter side to round(8 size / 7)
    and the longer one to the whole pixels of its share, then takes the middle: Resize(256) and CenterCrop(224) of
    ImageNet's test, whose pixels these are.
    """
    from PIL import Image

    if resize == "stretch":
        return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)
    if resize != "center-crop":
        raise ValueError(f"resize: expected stretch or center-crop, got {resize!r}")
    width, height = picture.size
    shorter = round(size * 8 / 7)
    longer = int(shorter * max(width, height) / min(width, height))
    sides = (shorter, longer) if width <= height else (longer, shorter)
    if picture.size != sides:
        picture = picture.resize(sides, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in sides)
    return picture.crop((left, top, left + size, top + size))


def as_tensor(picture: Any) -> Tensor:
    """A Pillow image, grey or RGB, as [C, H, W] float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.reshape(picture.height, picture.width, -1).permute(2, 0, 1).float() / 255


def read_image(path: Path, channels: int, size: int, resize: str = "stretch") -> Tensor:
    """An image file as [channels, size, size] float32 in [0, 1], see `fitted`; transparency is ignored.

    Raises DataError with the path where it is none.
    """
    return as_tensor(fitted(open_picture(path, channels, str(path)), size, resize))
