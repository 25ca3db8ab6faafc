"""What a recipe says about its images: one part for each kind of data set. Problems have it in their schemas."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mlo.recipes import RecipePart
from problems.data.cifar import HALVES, cifar
from problems.data.digits import digits
from problems.data.folders import SUBSETS, image_folder, imagenet
from problems.data.splits import Fractions, Splits

Fraction = Annotated[float, Field(gt=0, le=1)]
BatchSize = Annotated[int, Field(ge=2)]
"""Of training: the networks normalize over a batch."""


class DigitsRecipe(RecipePart):
    """scikit-learn's handwritten digits.

    Attributes:
        fractions: of teacher training, student training, validation, unlabelled and test images.
        num_workers: processes of each loader.
    """

    kind: Literal["digits"] = "digits"
    fractions: tuple[float, float, float, float, float] = (0.24, 0.2, 0.2, 0.16, 0.2)
    num_workers: NonNegativeInt = 0

    def build(self, seed: int) -> Splits:
        """Load and split."""
        return digits(seed, self.fractions, num_workers=self.num_workers)


class _FilesRecipe(RecipePart):
    """What the data sets have in common that are read from files.

    Attributes:
        root: the folder; `~` is the user's.
        train_fraction: of the training images, for teacher and student.
        validation_fraction: of the training images.
        unlabelled_fraction: of the images that unlabelled ones are taken from.
        limit: images of each class that are kept, or None for all.
        num_workers: processes of each loader.
    """

    root: Annotated[str, Field(min_length=1)]
    train_fraction: Fraction
    validation_fraction: Fraction
    unlabelled_fraction: Fraction
    limit: PositiveInt | None = None
    num_workers: NonNegativeInt = 0

    def _fractions(self, test: float | None = None) -> Fractions:
        return Fractions(self.train_fraction, self.validation_fraction, self.unlabelled_fraction, test)


class _CIFARRecipe(_FilesRecipe):
    """A CIFAR; the unlabelled images are the other one's.

    Attributes:
        download: fetch what is missing.
    """

    train_fraction: Fraction = HALVES.train
    validation_fraction: Fraction = HALVES.validation
    unlabelled_fraction: Fraction = HALVES.unlabelled
    download: bool = False

    @model_validator(mode="after")
    def _check_fractions(self) -> _CIFARRecipe:
        self._fractions().require_disjoint("train", "validation")
        return self

    def _build(self, num_classes: Literal[10, 100], seed: int) -> Splits:
        return cifar(
            num_classes,
            self.root,
            seed,
            self._fractions(),
            download=self.download,
            limit=self.limit,
            num_workers=self.num_workers,
        )


class CIFAR10Recipe(_CIFARRecipe):
    """CIFAR-10; the unlabelled images are CIFAR-100's."""

    kind: Literal["cifar10"] = "cifar10"

    def build(self, seed: int) -> Splits:
        """Load and split."""
        return self._build(10, seed)


class CIFAR100Recipe(_CIFARRecipe):
    """CIFAR-100; the unlabelled images are CIFAR-10's."""

    kind: Literal["cifar100"] = "cifar100"

    def build(self, seed: int) -> Splits:
        """Load and split."""
        return self._build(100, seed)


class ImageNetRecipe(_FilesRecipe):
    """ImageNet (ILSVRC2012), its files in class folders.

    Attributes:
        image_size: of the crops, in pixels.
    """

    kind: Literal["imagenet"] = "imagenet"
    train_fraction: Fraction = SUBSETS.train
    validation_fraction: Fraction = SUBSETS.validation
    unlabelled_fraction: Fraction = SUBSETS.unlabelled
    image_size: PositiveInt = 224

    @model_validator(mode="after")
    def _check_fractions(self) -> ImageNetRecipe:
        self._fractions().require_disjoint()
        return self

    def build(self, seed: int) -> Splits:
        """Find the files and split."""
        return imagenet(
            self.root,
            seed,
            self._fractions(),
            image_size=self.image_size,
            limit=self.limit,
            num_workers=self.num_workers,
        )


class ImageFolderRecipe(_FilesRecipe):
    """Any image files in class folders.

    Attributes:
        test_fraction: of the training images, where there is no folder of test images; else None.
        image_size: of the crops, in pixels.
    """

    kind: Literal["image_folder"] = "image_folder"
    train_fraction: Fraction = 0.4
    validation_fraction: Fraction = 0.2
    unlabelled_fraction: Fraction = 0.2
    test_fraction: Fraction | None = None
    image_size: PositiveInt = 224

    @model_validator(mode="after")
    def _check_fractions(self) -> ImageFolderRecipe:
        self._fractions(self.test_fraction).require_disjoint()
        return self

    def build(self, seed: int) -> Splits:
        """Find the files and split."""
        return image_folder(
            self.root,
            seed,
            self._fractions(self.test_fraction),
            image_size=self.image_size,
            limit=self.limit,
            num_workers=self.num_workers,
        )


DataRecipe: TypeAlias = Annotated[
    DigitsRecipe | CIFAR10Recipe | CIFAR100Recipe | ImageNetRecipe | ImageFolderRecipe, Field(discriminator="kind")
]
"""The images of a recipe, told apart by `kind`."""
