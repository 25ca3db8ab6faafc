"""Small data sets in the real formats: CIFAR's pickled batches and folders of JPEG files."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

NUM_CLASSES = {CIFAR10: 10, CIFAR100: 100}
LABELS = {CIFAR10: "labels", CIFAR100: "fine_labels"}


def write_cifar(dataset, root, patch: pytest.MonkeyPatch, *, per_class):
    """Write a data set's files, and its archive in `published`, and have torchvision's checksums be theirs.

    Args:
        dataset: CIFAR10 or CIFAR100.
        root: the folder.
        patch: for the checksums.
        per_class: images of each class in each batch. The first pixel of an image is its label.
    """
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    num_classes = NUM_CLASSES[dataset]
    checksums = {}
    for name, _ in dataset.train_list + dataset.test_list:
        labels = generator.permutation(np.repeat(np.arange(num_classes), per_class))
        data = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        data[:, 0] = labels
        checksums[name] = _dump(folder / name, {"data": data, LABELS[dataset]: labels.tolist()})
    names = [f"class {label}" for label in range(num_classes)]
    meta = {**dataset.meta, "md5": _dump(folder / dataset.meta["filename"], {dataset.meta["key"]: names})}
    archive = root / "published" / dataset.filename
    archive.parent.mkdir(exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, dataset.base_folder)
    patch.setattr(dataset, "train_list", [[name, checksums[name]] for name, _ in dataset.train_list])
    patch.setattr(dataset, "test_list", [[name, checksums[name]] for name, _ in dataset.test_list])
    patch.setattr(dataset, "meta", meta)
    patch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return folder


def write_folder(folder, counts, size=(12, 10)):
    """Write JPEG files: `counts` are the images of each class, whose mean grey is a number of its own."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), number % 256, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{index}.JPEG")
            number += 1
    return folder


def _dump(path, content):
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()
