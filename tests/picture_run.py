"""A short run on folders of JPEG files: three known classes of one colour each, outliers and unknowns of noise."""

import json
import subprocess
import sys

import numpy as np
from PIL import Image

from oodkern.config import load_config
from oodkern.training import train

CLASSES = ("red", "green", "blue", "grey", "pale")


def write_pictures(folder):
    """FOLDER/CLASS/*.jpg, 30 of each, 20x24 pixels."""
    generator = np.random.default_rng(0)
    for kind, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i in range(30):
            pixels = generator.integers(0, 80, (20, 24, 3)) + 10 * kind
            if kind < 3:
                pixels[..., kind] += 150
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def train_on(folder, output, *words):
    """On images of 16x16 pixels."""
    given = (
        f"output={output}", "name=r", "epochs=2", "pretrain.epochs=2", "model.width=4", f"data.name=folder:{folder}",
        "data.size=16", "data.classes=[3,1,1]", "optimizer.batch_size=16", "optimizer.outlier_batch_size=16",
        *words,
    )  # fmt: skip
    return train(load_config(None, given), log=lambda line: None, report=False)


def in_a_new_process(program, *arguments):
    """What a program prints as JSON, of a process of its own."""
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
