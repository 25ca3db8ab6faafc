"""The primitives: the candidate operations of the DARTS family, each built once, here.

The mixed operations of a supernet, the cells of an evaluation network and the checks of a genotype all look their
primitives up in `PRIMITIVES`. At stride 2 every primitive maps a side of n pixels to ceil(n / 2), so that branches can
be added whatever the size of the image.

Source: DARTS (Liu et al. 2019), section 3.1 and its published code; the two last primitives occur in the NASNet and
AmoebaNet cells that it compares with.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from problems.search_spaces.depthwise import is_channels_last

Primitive = Callable[[int, int, bool], nn.Module]
"""A constructor `(channels, stride, affine) -> module`; the module keeps the number of channels."""


class Zero(nn.Module):
    """The primitive `none`: zeros, of the strided shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to zeros of (batch, channels, ceil(height / s), ceil(width / s))."""
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class FactorizedReduce(nn.Module):
    """Halve the resolution with two 1x1 convolutions, one on the even pixels and one on the odd ones.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least 2: the first half reads the even pixels.
        affine: Whether the BatchNorm has a learnable scale and shift.

    Raises:
        ValueError: `out_channels` is less than 2.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool) -> None:
        super().__init__()
        if out_channels < 2:
            raise ValueError(
                f"FactorizedReduce splits its output in two: expected out_channels >= 2, got {out_channels}"
            )
        half = out_channels // 2
        self.even = nn.Conv2d(in_channels, half, 1, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - half, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    @staticmethod
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels of even rows and columns, and those of odd ones, of (ceil(h / 2), ceil(w / 2)) both.

        An odd side has one even pixel more than odd ones: a border of zeros makes up for it.
        """
        odd, height, width = every_second(x, 1), x.shape[2] % 2, x.shape[3] % 2
        return every_second(x, 0), functional.pad(odd, (0, width, 0, height)) if height or width else odd

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to (batch, out_channels, ceil(h / 2), ceil(w / 2))."""
        even, odd = self.halves(functional.relu(x))
        halved: Tensor = self.norm(torch.cat((self.even(even), self.odd(odd)), dim=1))
        return halved


def every_second(x: Tensor, first: int) -> Tensor:
    """Return the pixels of every second row and column, beginning with the one of number `first`.

    The gradient of a slice is laid out in the order of the dimensions sliced, so that they are put into that of memory.
    """
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1)[:, first::2, first::2].permute(0, 3, 1, 2)
    return x[:, :, first::2, first::2]


def relu_conv_norm(in_channels: int, out_channels: int, affine: bool) -> nn.Sequential:
    """ReLU, 1x1 convolution, BatchNorm: brings the inputs of a cell to its number of channels."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )


def _depthwise(channels: int, kernel_size: int, stride: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation=dilation, groups=channels, bias=False)


def _separable(channels: int, stride: int, affine: bool, *, kernel_size: int) -> nn.Sequential:
    """[ReLU, depthwise k x k, 1x1, BatchNorm] twice; the stride is in the first depthwise convolution."""
    return nn.Sequential(
        nn.ReLU(),
        _depthwise(channels, kernel_size, stride),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
        nn.ReLU(),
        _depthwise(channels, kernel_size, stride=1),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def _dilated(channels: int, stride: int, affine: bool, *, kernel_size: int) -> nn.Sequential:
    """ReLU, depthwise k x k of dilation 2, 1x1, BatchNorm."""
    return nn.Sequential(
        nn.ReLU(),
        _depthwise(channels, kernel_size, stride, dilation=2),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def _factorized_7x7(channels: int, stride: int, affine: bool) -> nn.Sequential:
    """ReLU, 1x7, 7x1, BatchNorm; each convolution strides along its own axis."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _none(_channels: int, stride: int, _affine: bool) -> nn.Module:
    return Zero(stride)


def _max_pool(_channels: int, stride: int, _affine: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride, padding=1)


def _average_pool(_channels: int, stride: int, _affine: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


PRIMITIVES: Mapping[str, Primitive] = MappingProxyType(
    {
        "none": _none,
        "max_pool_3x3": _max_pool,
        "avg_pool_3x3": _average_pool,
        "skip_connect": _skip,
        "sep_conv_3x3": partial(_separable, kernel_size=3),
        "sep_conv_5x5": partial(_separable, kernel_size=5),
        "dil_conv_3x3": partial(_dilated, kernel_size=3),
        "dil_conv_5x5": partial(_dilated, kernel_size=5),
        "sep_conv_7x7": partial(_separable, kernel_size=7),
        "conv_7x1_1x7": _factorized_7x7,
    }
)
"""Every primitive by name: first the eight of DARTS, in their published order, then two of NASNet and AmoebaNet."""


def check_primitive(name: str) -> None:
    """Refuse a name that is not in `PRIMITIVES`.

    Raises:
        ValueError: The name is unknown; the message gives the nearest known ones.
    """
    if name not in PRIMITIVES:
        nearest = difflib.get_close_matches(name, PRIMITIVES, n=2)
        hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
        raise ValueError(f"unknown primitive {name!r}: {hint}The known primitives are {', '.join(PRIMITIVES)}")
