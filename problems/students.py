"""The student networks: torchvision's ResNets, at any width, with a stem that fits the size of the images."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

_DEPTHS: dict[int, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    18: (BasicBlock, [2, 2, 2, 2]),
    50: (Bottleneck, [3, 4, 6, 3]),
}


class StudentResNet(ResNet):  # type: ignore[misc]
    """A ResNet (He et al. 2016) with adjustable width; at width 64, 3 channels and the large stem just torchvision's.

    Args:
        depth: 18 or 50.
        num_classes: classes.
        in_channels: channels of the images.
        width: channels of the first stage, doubled at each of the three that follow.
        small_images: a 3 x 3 convolution of stride 1 and no pooling as the stem, as is usual at 32 x 32 pixels and
            below.

    Raises:
        ValueError: another depth, or a width below 1.

    Example:
        >>> import torch
        >>> StudentResNet(18, num_classes=10, in_channels=1, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: Literal[18, 50],
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        small_images: bool = True,
    ) -> None:
        if depth not in _DEPTHS or width < 1:
            raise ValueError(f"expected depth 18 or 50 and width >= 1; found depth {depth}, width {width}")
        self._width = width
        block, layers = _DEPTHS[depth]
        super().__init__(block, layers)
        stem = (3, 1, 1) if small_images else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, width, stem[0], stride=stem[1], padding=stem[2], bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        if small_images:
            self.maxpool = nn.Identity()
        self.fc = nn.Linear(8 * width * block.expansion, num_classes)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        """Build a stage at this width: torchvision counts in multiples of 64 channels."""
        scaled = planes * self._width // 64
        if planes == 64:  # the first stage follows the stem
            self.inplanes = self._width
        stage: nn.Sequential = super()._make_layer(block, scaled, blocks, stride, dilate)
        return stage
