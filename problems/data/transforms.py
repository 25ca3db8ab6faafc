"""What happens to a raw image on its way into a network: in the search, in the evaluation phase, and in the test.

Sources: DARTS (Liu et al. 2019), section 3 and its published code, whose augmentations P-DARTS, PC-DARTS and LBT keep;
cutout: DeVries and Taylor 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from mlo import MloError

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, with pixels in [0, 1]."""

CIFAR10_STATISTICS: Statistics = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))
CIFAR100_STATISTICS: Statistics = ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preprocessing:
    """The transformations of raw images.

    Attributes:
        search: augmentation of training images in the search.
        evaluation: augmentation of training images in the evaluation phase, cutout left out.
        plain: no augmentation.
    """

    search: v2.Transform
    evaluation: v2.Transform
    plain: v2.Transform


class Cutout(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Set a square of an image to zero, its centre uniform over the image, what lies beyond the border clipped.

    After normalization zero is the mean colour. torchvision's `RandomErasing` is another augmentation: its rectangle
    lies within the image and varies in size and shape. Source: DeVries and Taylor 2017, section 3.

    Args:
        pixels: side of the square, at least 1.

    Raises:
        MloError: `pixels` is not positive.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        if pixels < 1:
            raise MloError(f"cutout: expected a side of at least 1 pixel, or None for no cutout; found {pixels}")
        self.pixels = pixels

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the square: its rows and columns, as slices."""
        height, width = flat_inputs[0].shape[-2:]
        return {"rows": self._side(height), "columns": self._side(width)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Return the image, shape (..., height, width), with zeros in the square."""
        image = inpt.clone()
        image[..., params["rows"], params["columns"]] = 0
        return image

    def _side(self, size: int) -> slice:
        low = int(torch.randint(size, ())) - self.pixels // 2
        return slice(max(low, 0), max(low + self.pixels, 0))


def cifar_preprocessing(statistics: Statistics) -> Preprocessing:
    """Crops of 32 pixels from images padded by 4, and flips, in both phases; normalized."""
    normalize = _normalized(statistics)
    augmentation = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *normalize])
    return Preprocessing(augmentation, augmentation, v2.Compose(normalize))


def imagenet_preprocessing(image_size: int, statistics: Statistics = IMAGENET_STATISTICS) -> Preprocessing:
    """Crops of random size and shape, flips and colours, in both phases; else the centre; normalized.

    Args:
        image_size: of the crops, in pixels. The centre is cut from the image resized to 256 / 224 of it.
        statistics: to normalize with.
    """
    normalize = _normalized(statistics)
    augmentation = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.2),
            *normalize,
        ]
    )
    resized = round(image_size * 256 / 224)
    plain = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop(image_size), *normalize])
    return Preprocessing(augmentation, augmentation, plain)


def _normalized(statistics: Statistics) -> Sequence[v2.Transform]:
    mean, std = statistics
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
