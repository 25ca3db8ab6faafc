"""`imagenet` and `image_folder`: image files in a folder for each class, decoded when they are asked for."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from mlo import MloError
from problems.data.images import ImageFiles, LabelledImages
from problems.data.splits import Fractions, Splits, limited, require_images, split_by_class
from problems.data.transforms import imagenet_preprocessing

SUBSETS = Fractions(train=0.1, validation=0.025, unlabelled=0.1)
"""LBT's of ImageNet."""


def imagenet(
    root: str | Path,
    seed: int,
    fractions: Fractions = SUBSETS,
    *,
    image_size: int = 224,
    limit: int | None = None,
    num_workers: int = 0,
) -> Splits:
    """Split ImageNet (ILSVRC2012: 1,281,167 training and 50,000 validation images, 1,000 classes) as LBT does.

    Args:
        root: the folder that holds `train` and `val`, each with a folder of JPEG files for each class.
        seed: of the split.
        fractions: of the training images, by class, disjoint. The evaluation phase trains on all of them; the test
            images are those of `val`.
        image_size: of the crops, in pixels.
        limit: images of each class that are kept of the training and of the test images, or None for all.
        num_workers: of each loader.

    Raises:
        MloError: the folders are missing or laid out wrongly; the fractions do not fit; a part is empty.
    """
    folder = Path(root).expanduser()
    layout = (
        f"Expected layout: {folder}/train/n01440764/n01440764_10026.JPEG, ... and\n"
        f"{folder}/val/n01440764/ILSVRC2012_val_00000293.JPEG, ...: a folder for each class in both. Get "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org (an account is needed); the "
        "first holds an archive for each class, and the images of the second are to be sorted into class folders."
    )
    return _split(
        "ImageNet",
        folder,
        folder / "val",
        layout,
        seed=seed,
        fractions=fractions,
        image_size=image_size,
        limit=limit,
        num_workers=num_workers,
    )


def image_folder(
    root: str | Path,
    seed: int,
    fractions: Fractions,
    *,
    image_size: int = 224,
    limit: int | None = None,
    num_workers: int = 0,
) -> Splits:
    """Split the images of a folder, prepared as ImageNet's are.

    Args:
        root: the folder that holds `train` and, unless `fractions.test` is given, `test` or `val`, each with a folder
            of image files for each class.
        seed: of the split.
        fractions: of the training images, by class, disjoint. The evaluation phase trains on all but the test images.
        image_size: of the crops, in pixels.
        limit: images of each class that are kept of the training and of the test images, or None for all.
        num_workers: of each loader.

    Raises:
        MloError: the folders are missing or laid out wrongly; the fractions do not fit; a part is empty.
    """
    folder = Path(root).expanduser()
    layout = (
        f"Expected layout: {folder}/train/CLASS/IMAGE, with a folder for each class, and likewise {folder}/test or "
        f"{folder}/val. Without them, say `test_fraction`, for the fraction of train that the test is to have. Images "
        f"end with {', '.join(IMG_EXTENSIONS)}."
    )
    found = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if fractions.test is not None and found:
        raise MloError(
            f"test_fraction: expected none where there is a folder of test images; found {fractions.test} and "
            f"{found[0]}.\n{layout}"
        )
    test_folder = None if fractions.test is not None else (found or [folder / "test"])[0]
    return _split(
        "image_folder",
        folder,
        test_folder,
        layout,
        seed=seed,
        fractions=fractions,
        image_size=image_size,
        limit=limit,
        num_workers=num_workers,
    )


def _split(
    data: str,
    folder: Path,
    test_folder: Path | None,
    layout: str,
    *,
    seed: int,
    fractions: Fractions,
    image_size: int,
    limit: int | None,
    num_workers: int,
) -> Splits:
    fractions.require_disjoint()
    generator = torch.Generator().manual_seed(seed)
    class_names, files = _class_folders(data, folder / "train", layout)
    images = limited(files, limit, generator)
    parts = split_by_class(images.labels, tuple(fractions.given.values()), generator)
    train, validation, unlabelled = (images.subset(part) for part in parts[:3])
    test: LabelledImages
    if test_folder is None:
        test = images.subset(parts[3])
        is_test = torch.zeros(len(images), dtype=torch.bool)
        is_test[parts[3]] = True
        evaluation_train = images.subset((~is_test).nonzero().flatten())
    else:
        test_names, test_files = _class_folders(data, test_folder, layout)
        if test_names != class_names:
            raise MloError(
                f"{data}: expected the same classes in {folder / 'train'} and {test_folder}; found in one only: "
                f"{_some(set(class_names) ^ set(test_names))}.\n{layout}"
            )
        test, evaluation_train = limited(test_files, limit, generator), images
    splits = Splits(
        teacher_train=train,
        student_train=train,
        validation=validation,
        unlabelled=unlabelled.without_labels(),
        test=test,
        evaluation_train=evaluation_train,
        preprocessing=imagenet_preprocessing(image_size),
        class_names=class_names,
        in_channels=3,
        image_size=image_size,
        num_workers=num_workers,
    )
    require_images(f"{data} in {folder}", splits)
    return splits


def _class_folders(data: str, folder: Path, layout: str) -> tuple[tuple[str, ...], ImageFiles]:
    """Return the names of the classes and the files of all of them."""
    if not folder.is_dir():
        raise MloError(f"{data}: expected a folder {folder}; found none.\n{layout}")
    stray = list(islice((path.name for path in folder.iterdir() if path.name.lower().endswith(IMG_EXTENSIONS)), 4))
    if stray:
        raise MloError(f"{data}: expected class folders in {folder}; found images in it, {_some(stray)}.\n{layout}")
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        raise MloError(f"{data}: expected images of each class in {folder}; {error}\n{layout}") from error
    files, labels = zip(*found.samples, strict=True)
    return tuple(found.classes), ImageFiles(files, torch.tensor(labels))


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
