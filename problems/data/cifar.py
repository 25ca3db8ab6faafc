"""`cifar10` and `cifar100`, split as in LBT: each has the other one's training images as its unlabelled images.

The files are those of torchvision's data sets, in its layout. They are pickles, so each is unpickled only after its
checksum was compared with that of the published file.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from mlo import MloError
from problems.data.images import NO_LABEL, Images
from problems.data.splits import Fractions, Splits, limited, require_images, split_by_class
from problems.data.transforms import CIFAR10_STATISTICS, CIFAR100_STATISTICS, cifar_preprocessing

HALVES = Fractions(train=0.5, validation=0.5, unlabelled=1.0)
"""LBT's: half of the training images to train on, half for validation, all of the other CIFAR's unlabelled."""


def cifar(
    num_classes: Literal[10, 100],
    root: str | Path,
    seed: int,
    fractions: Fractions = HALVES,
    *,
    download: bool = False,
    limit: int | None = None,
    num_workers: int = 0,
) -> Splits:
    """Split CIFAR-10 or CIFAR-100 (50,000 training and 10,000 test images of 32 x 32 pixels) as LBT does.

    Args:
        num_classes: which of the two.
        root: the folder that holds `cifar-10-batches-py` and `cifar-100-python`.
        seed: of the split.
        fractions: of the training images, by class; `unlabelled` is of the other CIFAR's training images.
        download: fetch what is missing or damaged.
        limit: images of each class that are kept of the training and of the test images, or None for all. No more
            unlabelled images are kept than training images.
        num_workers: of each loader.

    Raises:
        MloError: a file is missing or damaged, or cannot be downloaded; the fractions do not fit; a part is empty.
    """
    fractions.require_disjoint("train", "validation")
    dataset, other, statistics = (
        (CIFAR10, CIFAR100, CIFAR10_STATISTICS) if num_classes == 10 else (CIFAR100, CIFAR10, CIFAR100_STATISTICS)
    )
    folder = Path(root).expanduser()
    for needed in (dataset, other):
        _require_files(needed, folder, download=download)
    generator = torch.Generator().manual_seed(seed)
    loaded = dataset(folder)
    labelled = limited(Images(_pixels(loaded), torch.tensor(loaded.targets)), limit, generator)
    loaded_test = dataset(folder, train=False)
    test = limited(Images(_pixels(loaded_test), torch.tensor(loaded_test.targets)), limit, generator)
    train, validation = split_by_class(labelled.labels, (fractions.train, fractions.validation), generator)
    teacher_train = labelled.subset(train)
    splits = Splits(
        teacher_train=teacher_train,
        student_train=teacher_train,
        validation=labelled.subset(validation),
        unlabelled=_unlabelled(other, folder, fractions.unlabelled, len(labelled), generator),
        test=test,
        evaluation_train=labelled,
        preprocessing=cifar_preprocessing(statistics),
        class_names=tuple(loaded.classes),
        in_channels=3,
        image_size=32,
        num_workers=num_workers,
    )
    require_images(f"CIFAR-{num_classes} in {folder}", splits)
    return splits


def _unlabelled(dataset: type[CIFAR10], folder: Path, fraction: float, most: int, generator: torch.Generator) -> Images:
    """Choose from a CIFAR's training images at random, and not by class: the labels are not looked at."""
    pixels = _pixels(dataset(folder))
    number = round(fraction * min(most, len(pixels)))
    chosen = torch.randperm(len(pixels), generator=generator)[:number].sort().values
    return Images(pixels[chosen], torch.full((number,), NO_LABEL))


def _pixels(loaded: CIFAR10) -> Tensor:
    """Return the images as torch has them, shape (n, 3, 32, 32), uint8; torchvision keeps (n, 32, 32, 3)."""
    return torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()


def _require_files(dataset: type[CIFAR10], folder: Path, *, download: bool) -> None:
    """Check each file against its published checksum, so that none is unpickled which is not the published one."""
    damaged = _damaged_files(dataset, folder)
    if damaged and download:
        try:
            download_url(dataset.url, folder, filename=dataset.filename, md5=dataset.tgz_md5)
            _unpack(folder / dataset.filename, folder)
        # What urllib, torchvision and tarfile raise: no network, a wrong checksum, too many redirects, no space, ...
        except (OSError, RuntimeError, tarfile.TarError, EOFError) as error:
            raise MloError(
                f"{dataset.__name__}: cannot download {dataset.url} to {folder} ({error}). Check the network and the "
                f"space, or fetch the archive elsewhere and unpack it.\n{_layout(dataset, folder)}"
            ) from error
        damaged = _damaged_files(dataset, folder)
    if damaged:
        raise MloError(
            f"{dataset.__name__}: expected the published files; found these missing or damaged:\n"
            + "\n".join(f"  {path}: {finding}" for path, finding in damaged.items())
            + f"\n{_layout(dataset, folder)}\n"
            f"Say `download: true` in the recipe's `data` to fetch them, or unpack {dataset.url} in {folder}."
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive; torchvision's own function warns on Python 3.12 and 3.13, since it names no filter."""
    with tarfile.open(archive) as tar:
        # Nothing outside the folder, no links to elsewhere. The first releases of Python 3.10 and 3.11 have no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)


def _damaged_files(dataset: type[CIFAR10], folder: Path) -> dict[Path, str]:
    """Return what is wrong with the files that are not as published, by their paths."""
    damaged = {}
    for name, checksum in _files(dataset):
        path = folder / dataset.base_folder / name
        if not path.is_file():
            damaged[path] = "missing"
        elif not check_integrity(path, checksum):
            damaged[path] = f"damaged or cut off ({path.stat().st_size:,} bytes, whose checksum is not {checksum})"
    return damaged


def _files(dataset: type[CIFAR10]) -> list[tuple[str, str]]:
    """Return the names and MD5 checksums of a data set's files."""
    batches = [(name, checksum) for name, checksum in dataset.train_list + dataset.test_list]
    return [*batches, (dataset.meta["filename"], dataset.meta["md5"])]


def _layout(dataset: type[CIFAR10], folder: Path) -> str:
    names = " ".join(name for name, _ in _files(dataset))
    return f"Expected layout: {folder}/{dataset.base_folder}/ with the files {names}."
