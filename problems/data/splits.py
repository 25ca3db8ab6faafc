"""The parts of a data set that a search and an evaluation need, and how they are cut out of it.

Each data set (`digits`, `cifar`, `folders`) builds a `Splits`; the problems ask it for images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mlo import MloError
from problems.data.images import Batch, LabelledImages, Transformed
from problems.data.transforms import Cutout, Preprocessing


@dataclass(frozen=True)
class Splits:
    """The parts of a data set that Learning by Teaching needs (LBT, section 3.1).

    Parts are raw; `augmented` and `plain` prepare them for a network. Teacher and student may train on the same part;
    otherwise no image is in two parts. They are in memory or in files, which makes no difference to the caller.

    Attributes:
        teacher_train: D_t^tr, labelled.
        student_train: D_s^tr, labelled.
        validation: D_t^val and D_s^val, labelled.
        unlabelled: D_u; its labels are gone.
        test: read once, after all training.
        evaluation_train: all labelled images that are not for the test, to train an evaluation network on.
        preprocessing: of raw images.
        class_names: in the order of the labels.
        in_channels: channels of an image.
        image_size: height and width of an image that was prepared for a network, in pixels.
        num_workers: processes that each loader of these images is to have, or 0 to load in the main process.
    """

    teacher_train: LabelledImages
    student_train: LabelledImages
    validation: LabelledImages
    unlabelled: LabelledImages
    test: LabelledImages
    evaluation_train: LabelledImages
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    in_channels: int
    image_size: int
    num_workers: int = 0

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """Return what is different if any part consists of other images."""
        parts = (
            self.teacher_train,
            self.student_train,
            self.validation,
            self.unlabelled,
            self.test,
            self.evaluation_train,
        )
        return hashlib.sha256("".join(part.fingerprint() for part in parts).encode()).hexdigest()

    def augmented(self, part: LabelledImages) -> Dataset[Batch]:
        """Return a part with the search's augmentation of training images."""
        return Transformed(part, self.preprocessing.search)

    def plain(self, part: LabelledImages) -> Dataset[Batch]:
        """Return a part resized, cropped and normalized, and not augmented."""
        return Transformed(part, self.preprocessing.plain)

    def evaluation_training(self, *, cutout: int | None) -> Dataset[Batch]:
        """Return all labelled images that are not for the test, with the evaluation phase's augmentation.

        Args:
            cutout: side of the square that is cut out of each image, in pixels, or None.

        Raises:
            MloError: `cutout` is not positive.
        """
        augmentation = self.preprocessing.evaluation
        if cutout is not None:
            augmentation = v2.Compose([augmentation, Cutout(cutout)])
        return Transformed(self.evaluation_train, augmentation)


@dataclass(frozen=True)
class Fractions:
    """How large the parts of a data set are, as fractions of each class.

    Attributes:
        train: that teacher and student both train on.
        validation: for validation.
        unlabelled: whose labels are dropped.
        test: for the test, or None for data with test images of their own.

    Raises:
        MloError: a fraction is not in (0, 1].
    """

    train: float
    validation: float
    unlabelled: float
    test: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            if not 0 < value <= 1:
                raise MloError(f"fraction of {name} images: expected a number in (0, 1]; found {value}")

    @property
    def given(self) -> dict[str, float]:
        """The fractions by name, without a `test` that is None."""
        given = {"train": self.train, "validation": self.validation, "unlabelled": self.unlabelled}
        return given if self.test is None else {**given, "test": self.test}

    def require_disjoint(self, *names: str) -> None:
        """Check that parts can be cut out of the same images, all parts if none is named.

        Raises:
            MloError: the sum of the fractions exceeds 1.
        """
        chosen = {name: self.given[name] for name in names or self.given}
        if sum(chosen.values()) > 1 + 1e-6:
            raise MloError(f"fractions of {', '.join(chosen)} images: expected a sum of at most 1; found {chosen}")


def split_by_class(labels: Tensor, fractions: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Return disjoint index sets, one a fraction, each with the class frequencies of the whole.

    Args:
        labels: shape (n,).
        fractions: of each part; their sum is at most 1.
        generator: of the random order.
    """
    bounds = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for members in _shuffled_classes(labels, generator):
        cuts = (bounds * len(members)).round().long().tolist()
        for part, (low, high) in zip(parts, pairwise(cuts), strict=True):
            part.append(members[low:high])
    return [torch.cat(part).sort().values for part in parts]


def limited(images: LabelledImages, limit: int | None, generator: torch.Generator) -> LabelledImages:
    """Return at most `limit` random images of each class, or all images if it is None."""
    if limit is None:
        return images
    kept = [members[:limit] for members in _shuffled_classes(images.labels, generator)]
    return images.subset(torch.cat(kept).sort().values)


def require_images(data: str, splits: Splits) -> None:
    """Check that no part is empty.

    Args:
        data: what the parts are of, for the message.
        splits: the parts.

    Raises:
        MloError: a part has no images.
    """
    parts = {
        "training": splits.teacher_train,
        "validation": splits.validation,
        "unlabelled": splits.unlabelled,
        "test": splits.test,
    }
    empty = [name for name, part in parts.items() if len(part) == 0]
    if empty:
        raise MloError(
            f"{data}: expected images in each part; found no {' and no '.join(empty)} images. Fractions are of each "
            f"class, as `limit` leaves it: raise `limit` or the fractions of these parts, or add images."
        )


def _shuffled_classes(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the indices of each class, in the order of the classes, each in random order."""
    order = labels.argsort(stable=True)
    ends = labels.bincount().cumsum(0).tolist()
    classes = order.tensor_split(ends[:-1])
    return [members[torch.randperm(len(members), generator=generator)] for members in classes]
