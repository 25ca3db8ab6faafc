"""Image data sets, their splits, and loaders whose order and augmentation are repeatable.

A recipe's part (`recipes`) builds a `Splits` (`splits`) of one of the data sets (`digits`, `cifar`, `folders`), whose
raw images (`images`) are transformed (`transforms`) and batched (`loading`).
"""

from problems.data.cifar import cifar
from problems.data.digits import digits
from problems.data.folders import image_folder, imagenet
from problems.data.images import NO_LABEL, Batch, ImageFiles, Images, LabelledImages, Transformed
from problems.data.loading import Loader, Together, loader
from problems.data.recipes import (
    BatchSize,
    CIFAR10Recipe,
    CIFAR100Recipe,
    DataRecipe,
    DigitsRecipe,
    ImageFolderRecipe,
    ImageNetRecipe,
)
from problems.data.splits import Fractions, Splits, split_by_class
from problems.data.transforms import Cutout, Preprocessing

__all__ = [
    "NO_LABEL",
    "Batch",
    "BatchSize",
    "CIFAR10Recipe",
    "CIFAR100Recipe",
    "Cutout",
    "DataRecipe",
    "DigitsRecipe",
    "Fractions",
    "ImageFiles",
    "ImageFolderRecipe",
    "ImageNetRecipe",
    "Images",
    "LabelledImages",
    "Loader",
    "Preprocessing",
    "Splits",
    "Together",
    "Transformed",
    "cifar",
    "digits",
    "image_folder",
    "imagenet",
    "loader",
    "split_by_class",
]
