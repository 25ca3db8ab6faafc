"""Raw labelled images, in memory or in files, and the same with a transformation.

A data set's parts are of these types; `problems.data.splits` hands them out transformed.
"""

from __future__ import annotations

import hashlib
import struct
from abc import abstractmethod
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from mlo import MloError

Batch = tuple[Tensor, Tensor]
"""Images of shape (n, channels, height, width) and labels of shape (n,); of a data set's item, without n."""

NO_LABEL = -1
"""The label of an image whose label is not to be read: no loss accepts it as a class."""


class LabelledImages(Dataset[Batch]):
    """Raw images with labels. Images of one data set may differ in size.

    Args:
        labels: shape (n,), class indices, or `NO_LABEL`.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.image(index), self.labels[index]

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Return one image, shape (channels, height, width)."""

    def fingerprint(self) -> str:
        """Return what is different if other images, or the same ones otherwise labelled or ordered, stand here."""
        return hashlib.sha256(repr((self.labels.tolist(), self._names())).encode()).hexdigest()

    def _names(self) -> object:
        """What tells the images apart, beside their labels."""
        return None

    @abstractmethod
    def subset(self, indices: Tensor) -> LabelledImages:
        """Return the images at `indices`, shape (n,), with their labels."""

    @abstractmethod
    def without_labels(self) -> LabelledImages:
        """Return the same images, each with `NO_LABEL`."""


class Images(LabelledImages):
    """Images in memory.

    Args:
        images: shape (n, channels, height, width).
        labels: shape (n,), class indices, or `NO_LABEL`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(labels)
        self.images = images

    def image(self, index: int) -> Tensor:
        """Return one image, shape (channels, height, width)."""
        return self.images[index]

    def subset(self, indices: Tensor) -> Images:
        """Return a copy of the images at `indices`, shape (n,)."""
        return Images(self.images[indices], self.labels[indices])

    def without_labels(self) -> Images:
        """Return the same images, each with `NO_LABEL`."""
        return Images(self.images, torch.full_like(self.labels, NO_LABEL))


class ImageFiles(LabelledImages):
    """Image files, decoded when an image is asked for.

    Args:
        paths: of the files, in any format that Pillow reads.
        labels: shape (n,), class indices, or `NO_LABEL`.
    """

    def __init__(self, paths: tuple[str, ...], labels: Tensor) -> None:
        super().__init__(labels)
        self.paths = paths

    def _names(self) -> object:
        return [Path(path).parts[-2:] for path in self.paths]  # the data may be moved

    def image(self, index: int) -> Tensor:
        """Decode one image to RGB, uint8, shape (3, height, width).

        Raises:
            MloError: the file is not there, not an image, or cut off.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels: Tensor = functional.pil_to_tensor(image.convert("RGB"))
        # What Pillow raises, depending on the format, for files that are not what they seem.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise MloError(
                f"image {path}: expected a complete image file (JPEG, PNG, ...) in the folder of its class; found one "
                f"of {_size(path)} that cannot be decoded ({error}). Copy the file again; or delete it and "
                f"begin the run anew, as the images are then split otherwise."
            ) from error
        return pixels

    def subset(self, indices: Tensor) -> ImageFiles:
        """Return the files at `indices`, shape (n,)."""
        return ImageFiles(tuple(self.paths[index] for index in indices.tolist()), self.labels[indices])

    def without_labels(self) -> ImageFiles:
        """Return the same files, each with `NO_LABEL`."""
        return ImageFiles(self.paths, torch.full_like(self.labels, NO_LABEL))


class Transformed(Dataset[Batch]):
    """Images, each transformed when it is asked for.

    Args:
        images: raw.
        transform: of one image.
    """

    def __init__(self, images: LabelledImages, transform: v2.Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        image, label = self.images[index]
        return self.transform(image), label


def _size(path: str) -> str:
    try:
        return f"{Path(path).stat().st_size} bytes"
    except OSError:
        return "unknown size"
