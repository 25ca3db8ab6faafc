"""Stems: what stands between the image and the first cell of a network.

A stem returns the two tensors that the first cell reads, and says how many channels they have and whether the first is
twice as large as the second. `supernet.Supernet` and `evaluation.EvaluationNetwork` use them.

Source: DARTS (Liu et al. 2019), appendix A and its published code.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

Stem: TypeAlias = Literal["cifar", "imagenet"]

STEM_MULTIPLIER = 3
"""The CIFAR stem has three times the channels of the first cells."""


class CIFARStem(nn.Module):
    """For small images: one 3x3 convolution at full resolution.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the nodes of the first cells.
    """

    reduces = False

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        width = STEM_MULTIPLIER * channels
        self.out_channels = (width, width)
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, in_channels, h, w) to twice the same (batch, 3 * channels, h, w)."""
        x = self.layers(x)
        return x, x


class ImageNetStem(nn.Module):
    """For large images: three 3x3 convolutions of stride 2; the cells read the outputs of the second and the third.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the nodes of the first cells, at least 2.

    Raises:
        ValueError: `channels` is less than 2: the first convolution has half of them.
    """

    reduces = True

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"the ImageNet stem begins with channels // 2: expected channels >= 2, got {channels}")
        half = channels // 2
        self.out_channels = (channels, channels)
        self.stem0 = nn.Sequential(
            nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, in_channels, h, w) to (batch, channels, h / 4, w / 4) and (batch, channels, h / 8, w / 8)."""
        fourth = self.stem0(x)
        return fourth, self.stem1(fourth)


def build_stem(kind: Stem, in_channels: int, channels: int, imagenet_channels: int) -> CIFARStem | ImageNetStem:
    """Build a stem.

    Args:
        kind: `"cifar"` keeps the resolution, `"imagenet"` divides it by 8.
        in_channels: Channels of the images.
        channels: Channels of the nodes of the first cells.
        imagenet_channels: Channels of the stem for large images.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in get_args(Stem):
        raise ValueError(f"unknown stem {kind!r}: expected {' or '.join(map(repr, get_args(Stem)))}")
    return CIFARStem(in_channels, channels) if kind == "cifar" else ImageNetStem(in_channels, imagenet_channels)
