"""Image files of the MNIST family as a folder of colour JPEG files, one folder a class.

Sets that a detector is tested with have to pass through the codec that its training images passed through: else it
may learn which files are JPEG. `python benches/jpeg_folder.py data/mnist data/cifar/ood/mnist` writes the test images
at 32 x 32 pixels and quality 75.
"""

import argparse
from pathlib import Path

from PIL import Image

from oodkern.data import open_source
from oodkern.data.sources import part_of


def write(source: str, folder: Path, size: int, quality: int) -> int:
    """Writes the test images of a source, and returns how many they are."""
    images = part_of(open_source(source, channels=1, size=size), "test")
    for i, (pixels, label) in enumerate(images):
        path = folder / images.classes[label] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels[0] * 255).round().byte().numpy())
        grey.resize((size, size), Image.Resampling.BILINEAR).convert("RGB").save(path, quality=quality)
    return len(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder with files of the MNIST family, or KIND:DIR")
    parser.add_argument("folder", type=Path, help="where to write CLASS/NUMBER.jpg")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default 32)")
    parser.add_argument("--quality", type=int, default=75, help="of the JPEG coding (default 75)")
    options = parser.parse_args()
    source = options.source if ":" in options.source else f"idx:{options.source}"
    print(f"{write(source, options.folder, options.size, options.quality):,} images in {options.folder}")
