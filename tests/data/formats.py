"""Writers of the formats that oodkern reads, from their published descriptions; and readers of what it made of them."""

import gzip
import io
import itertools
import json
import pickle
import struct
import tarfile

import numpy as np
import torch


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, images, labels, part="train", ending=""):
    """`part` is train or t10k; labels may begin at any number."""
    write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
    write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels.astype(np.uint8))


def write_cifar10_python(folder, batches, test, names):
    """Batches of (pixels [N, 3072], labels), with byte keys at protocol 2 as Python 2 pickled them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"data_batch_{i}": batch for i, batch in enumerate(batches, 1)} | {"test_batch": test}
    for name, (pixels, labels) in files.items():
        content = {
            b"data": pixels,
            b"labels": labels.tolist(),
            b"batch_label": b"x",
            b"filenames": [b"a"] * len(labels),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [n.encode() for n in names]}, protocol=2))


def write_cifar100_python(folder, train, test, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in {"train": train, "test": test}.items():
        content = {b"data": pixels, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [n.encode() for n in names]}, protocol=2))


def write_cifar_binary(path, pixels, *label_columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = np.concatenate([*(column[:, None].astype(np.uint8) for column in label_columns), pixels], axis=1)
    path.write_bytes(records.tobytes())


def write_image(path, pixels):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def encoded(pixels, ending="png"):
    """The bytes of an image file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG"}.get(ending, ending.upper()))
    return buffer.getvalue()


def write_tar(path, files, mode="w", layout=tarfile.GNU_FORMAT):
    """`files`: (name, bytes) pairs, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=layout) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def sample(key, label=None, image=None, ending="png", **entries):
    """Names and bytes of a sample of a shard in the order of webdataset.ShardWriter, that of the suffixes."""
    found = {ending: encoded(np.full((8, 8, 3), 7, dtype=np.uint8) if image is None else image, ending)}
    if label is not None:
        found["cls"] = str(label).encode()
    if entries:
        found["json"] = json.dumps(entries).encode()
    return [(f"{key}.{suffix}", found[suffix]) for suffix in sorted(found)]


def write_shards(folder, labels, name="images-{:04d}.tar", each=3):
    """Shards of `each` random images; all images [N, 3, 8, 8] in [0, 1]."""
    draws = np.random.default_rng(0)
    images = [draws.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in labels]
    for start in range(0, len(labels), each):
        rows = range(start, min(start + each, len(labels)))
        files = itertools.chain(*(sample(f"{i:06d}", labels[i], images[i]) for i in rows))
        write_tar(folder / name.format(start // each), files)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def write_svhn(folder, images, digits, part="train"):
    """Images [N, 32, 32, 3] and digits 0 to 9, of which 0 is written 10, in the layout of MATLAB."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)


def annotation(name, objects):
    """XML as in VOC's Annotations. A person has parts with names of their own."""
    things = "".join(
        f"\t<object>\n\t\t<name>{kind}</name>\n\t\t<pose>Left</pose>\n\t\t<difficult>{int(difficult)}</difficult>\n"
        f"\t\t<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>\n"
        f"\t\t{'<part><name>head</name></part>' if kind == 'person' else ''}\n\t</object>\n"
        for kind, difficult in objects
    )
    return f"<annotation>\n\t<folder>VOC</folder>\n\t<filename>{name}.jpg</filename>\n{things}</annotation>\n"


def write_voc(folder, lists, objects, pixels):
    """`lists`: name of an image set to names of images; `objects`: name of an image to (class, difficult) pairs."""
    for part in ("Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for part, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    for name, found in objects.items():
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(name, found))
        write_image(folder / "JPEGImages" / f"{name}.jpg", pixels(name))


def write_coco(root, part, objects, categories, pixels):
    """`part`: train2017, for one; `objects`: name of a file to numbers of categories; `categories`: number to name."""
    files = list(objects)
    content = {
        "info": {"year": int(part[-4:])},
        "images": [{"id": 100 + i, "file_name": name, "width": 9, "height": 9} for i, name in enumerate(files)],
        "annotations": [
            {"id": 1000 * i + j, "image_id": 100 + i, "category_id": number, "bbox": [0, 0, 4, 4], "iscrowd": 0}
            for i, name in enumerate(files)
            for j, number in enumerate(objects[name])
        ],
        "categories": [{"supercategory": "x", "id": number, "name": name} for number, name in categories.items()],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    for name in files:
        write_image(root / part / name, pixels(name))


def all_of(images):
    return images.images(torch.arange(len(images)))


def rows(images):
    return {tuple(image) for image in all_of(images).flatten(1).tolist()}


def parts_of(split):
    return {
        "train": split.train,
        "validation": split.validation,
        "test": split.test,
        "outliers": split.outliers,
        "outlier_validation": split.outlier_validation,
        **split.test_ood,
    }
