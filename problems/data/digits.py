"""`digits`: scikit-learn's copy of the UCI handwritten digits (1,797 images of 8 x 8 pixels, 10 classes).

It comes with the package, so that everything can be run with no download.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from mlo import MloError
from problems.data.images import Images
from problems.data.splits import Splits, split_by_class
from problems.data.transforms import Preprocessing


def digits(seed: int, fractions: Sequence[float] = (0.24, 0.2, 0.2, 0.16, 0.2), *, num_workers: int = 0) -> Splits:
    """Split scikit-learn's digits. Raw images are normalized already; augmentation shifts them by up to one pixel.

    Args:
        seed: of the split; each part has (nearly) the class frequencies of the whole.
        fractions: of teacher training, student training, validation, unlabelled and test images; they sum to 1.
        num_workers: of each loader.

    Raises:
        MloError: a fraction is not positive, or they do not sum to 1.
    """
    if len(fractions) != 5 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise MloError(f"fractions: expected five positive numbers that sum to 1; found {tuple(fractions)}")
    loaded = load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16  # raw pixels are 0 ... 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    images = (pixels - pixels.mean()) / pixels.std()
    parts = split_by_class(labels, fractions, torch.Generator().manual_seed(seed))
    teacher_train, student_train, validation, unlabelled, test = (Images(images[i], labels[i]) for i in parts)
    labelled = torch.cat(parts[:3])
    shift = v2.RandomCrop(8, padding=1, fill=float(images.min()))  # with the background
    return Splits(
        teacher_train,
        student_train,
        validation,
        unlabelled.without_labels(),
        test,
        evaluation_train=Images(images[labelled], labels[labelled]),
        preprocessing=Preprocessing(search=shift, evaluation=shift, plain=v2.Identity()),
        class_names=tuple(str(name) for name in loaded.target_names),
        in_channels=1,
        image_size=8,
        num_workers=num_workers,
    )
