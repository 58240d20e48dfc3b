"""Image files, as they come and as they are damaged."""

import numpy as np
import pytest
import torch
from formats import write_image

from oodkern.data import DataError, read_image
from oodkern.data.images import image_files
from oodkern.data.readers import read_folder

generator = np.random.default_rng(0)


def pixels(*shape):
    return generator.integers(0, 256, shape, dtype=np.uint8)


def test_folders_that_link_to_those_above_them(tmp_path):
    write_image(tmp_path / "a" / "1.png", pixels(8, 8))
    for name in ("up", "again"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    assert image_files(tmp_path) == [tmp_path / "a" / "1.png"]


def test_modes_of_images(tmp_path):
    """16 bits are scaled, not cut off; cameras' turns are undone; colours, palettes and transparency are read."""
    from PIL import Image

    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    torch.testing.assert_close(
        read_image(tmp_path / "deep.png", 1, 8)[0], torch.from_numpy(ramp / 65535).float(), rtol=0, atol=2e-3 + 1 / 510
    )
    colour = pixels(8, 8, 3)
    image = Image.fromarray(colour)
    expected = torch.from_numpy(colour).permute(2, 0, 1) / 255
    turned, tags = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tags[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=tags)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    for name in ("turned", "alpha"):
        torch.testing.assert_close(read_image(tmp_path / f"{name}.png", 3, 8), expected, rtol=0, atol=0)
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    assert (read_image(tmp_path / "palette.gif", 3, 8) - expected).abs().max() < 0.1
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff: expected 8 or 16 bits a pixel"):
        read_image(tmp_path / "float.tiff", 1, 8)


def test_damaged_images_of_every_kind(tmp_path):
    """Whatever Pillow raises, the file is named."""
    from PIL import Image

    draws, named = np.random.default_rng(1), 0
    for ending in ("png", "ppm", "tiff", "jpg", "bmp", "gif"):
        Image.fromarray(pixels(12, 12, 3)).save(tmp_path / f"whole.{ending}")
        content = (tmp_path / f"whole.{ending}").read_bytes()
        for _ in range(40):
            damaged = bytearray(content[: draws.integers(1, len(content) + 1)])
            for at in draws.integers(0, min(len(damaged), 60), 4):
                damaged[at] = draws.integers(256)
            path = tmp_path / f"damaged.{ending}"
            path.write_bytes(damaged)
            try:
                read_image(path, 3, 8)
            except DataError as error:
                named += str(path) in str(error)
    assert named > 50


def test_a_broken_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    with pytest.raises(DataError, match=r"a\.png: not a readable image"):
        read_folder(tmp_path)["all"].images(torch.tensor([0]))
