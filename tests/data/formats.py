"""Writers of the formats that oodkern reads, from their published descriptions; and readers of what it made of them."""

import gzip
import pickle
import struct

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
