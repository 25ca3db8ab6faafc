"""Image data sets, their splits, and loaders whose order and augmentation are repeatable.

`digits` is scikit-learn's copy of the UCI handwritten digits (1,797 images of 8 x 8 pixels, 10 classes): it comes with
the package, so that everything can be run with no download.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from mlo import MloError
from mlo.recipes import RecipePart

Batch = tuple[Tensor, Tensor]


class Images(Dataset[Batch]):
    """Images in memory, with their labels.

    Args:
        images: shape (n, channels, height, width).
        labels: shape (n,), class indices.
        transform: augmentation of one image, or None.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform | None = None) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def augmented(self, transform: v2.Transform) -> Images:
        """Return the same images with an augmentation."""
        return Images(self.images, self.labels, transform)


@dataclass(frozen=True)
class Splits:
    """The disjoint parts of a data set that Learning by Teaching needs (LBT, section 3.1).

    Attributes:
        teacher_train: D_t^tr, labelled.
        student_train: D_s^tr, labelled.
        validation: D_t^val and D_s^val, labelled.
        unlabelled: D_u; its labels are never read.
        test: read once, after all training.
        augmentation: of training images.
        num_classes: classes.
        in_channels: channels of an image.
        image_size: height and width, in pixels.
    """

    teacher_train: Images
    student_train: Images
    validation: Images
    unlabelled: Images
    test: Images
    augmentation: v2.Transform
    num_classes: int
    in_channels: int
    image_size: int

    @property
    def labelled(self) -> Images:
        """All labelled images that are not for the test, to train an evaluation network on."""
        parts = (self.teacher_train, self.student_train, self.validation)
        return Images(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def digits(seed: int, fractions: Sequence[float] = (0.24, 0.2, 0.2, 0.16, 0.2)) -> Splits:
    """Split scikit-learn's digits.

    Args:
        seed: of the split; each part has (nearly) the class frequencies of the whole.
        fractions: of teacher training, student training, validation, unlabelled and test images; they sum to 1.

    Raises:
        MloError: a fraction is not positive, or they do not sum to 1.
    """
    if len(fractions) != 5 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise MloError(f"fractions: expected five positive numbers that sum to 1; found {tuple(fractions)}")
    loaded = load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 16  # raw pixels are 0 ... 16
    labels = torch.tensor(loaded.target, dtype=torch.int64)
    images = (pixels - pixels.mean()) / pixels.std()
    parts = [
        Images(images[indices], labels[indices])
        for indices in split_by_class(labels, fractions, torch.Generator().manual_seed(seed))
    ]
    background = float(images.min())
    shift = v2.RandomCrop(8, padding=1, fill=background)
    teacher_train, student_train, validation, unlabelled, test = parts
    return Splits(
        teacher_train, student_train, validation, unlabelled, test, shift, num_classes=10, in_channels=1, image_size=8
    )


def split_by_class(labels: Tensor, fractions: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Return disjoint index sets, one a fraction, each with the class frequencies of the whole.

    Args:
        labels: shape (n,).
        fractions: of each part; they sum to 1.
        generator: of the random order.
    """
    bounds = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    parts: list[list[Tensor]] = [[] for _ in fractions]
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cuts = (bounds * len(members)).round().long().tolist()
        for part, (low, high) in zip(parts, pairwise(cuts), strict=True):
            part.append(members[low:high])
    return [torch.cat(part).sort().values for part in parts]


def loader(images: Images, batch_size: int, *, shuffle: bool = True) -> DataLoader[Batch]:
    """Batch images; shuffled, the last incomplete batch is left out, in order it is kept.

    Raises:
        MloError: there are fewer images than a batch holds.
    """
    if shuffle and len(images) < batch_size:
        raise MloError(
            f"batch_size: expected at least one batch in each part of the data; found batches of {batch_size} images "
            f"and a part of {len(images)}"
        )
    sampler = RandomSampler(images) if shuffle else SequentialSampler(images)
    return DataLoader(images, batch_sampler=BatchSampler(sampler, batch_size, drop_last=shuffle))


class Together:
    """Several loaders, drawn from side by side: a batch is a tuple of one batch each. As long as the longest.

    A loader that is exhausted before the longest begins again.
    """

    def __init__(self, *loaders: DataLoader[Batch]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return max(map(len, self.loaders))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        endless = [_cycle(one) for one in self.loaders]
        for _ in range(len(self)):
            yield tuple(next(one) for one in endless)


def _cycle(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from batches


class DigitsRecipe(RecipePart):
    """scikit-learn's handwritten digits.

    Attributes:
        fractions: of teacher training, student training, validation, unlabelled and test images.
    """

    kind: Literal["digits"] = "digits"
    fractions: tuple[float, float, float, float, float] = (0.24, 0.2, 0.2, 0.16, 0.2)

    def build(self, seed: int) -> Splits:
        """Load and split."""
        return digits(seed, self.fractions)
