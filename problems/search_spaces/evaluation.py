"""The evaluation network: a genotype stacked to a deep network, to be trained from scratch.

Source: DARTS (Liu et al. 2019), sections 3.2, 3.3, appendix A and its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from problems.search_spaces.cells import EvaluationCell, cell_shapes
from problems.search_spaces.genotypes import Genotype
from problems.search_spaces.stems import Stem, build_stem


@dataclass(frozen=True)
class NetworkShape:
    """What an evaluation network was constructed with, the auxiliary head apart; see `EvaluationNetwork`."""

    genotype: Genotype
    num_classes: int
    channels: int
    num_cells: int
    in_channels: int
    stem: Stem


class Logits(NamedTuple):
    """What an evaluation network returns."""

    main: Tensor
    """(batch, num_classes)."""
    auxiliary: Tensor | None
    """(batch, num_classes) of the auxiliary head; None in eval mode and without a head."""


class AuxiliaryHead(nn.Module):
    """A second classifier, on the feature map after the second reduction, for training only.

    ReLU, average pool to 2x2, 1x1 convolution to 128 channels, 2x2 convolution to 768, linear. The four windows of the
    pool stand in the corners; they are 5x5, smaller on small maps, and larger where 5x5 would leave a gap. On maps of
    8x8 (CIFAR) and 7x7 (ImageNet) that is the published pool, 5x5 of stride 3 and of stride 2.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Classes.
        final_norm: Whether a BatchNorm follows the 2x2 convolution, as in the published CIFAR head; the published
            ImageNet head has none.
    """

    def __init__(self, in_channels: int, num_classes: int, *, final_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768) if final_norm else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, h, w) to logits of (batch, num_classes).

        Raises:
            ValueError: A side of the map is a single pixel.
        """
        logits: Tensor = self.classifier(self.features(_pool_to_2x2(functional.relu(x))).flatten(1))
        return logits


def _pool_to_2x2(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if min(height, width) < 2:
        raise ValueError(
            f"the auxiliary head needs a feature map of at least 2x2 pixels, got {height}x{width}: "
            "train on larger images or build the network with auxiliary=False"
        )
    kernel = _window(height), _window(width)
    # The stride that makes the second window end with the map.
    return functional.avg_pool2d(x, kernel, (height - kernel[0], width - kernel[1]))


def _window(side: int) -> int:
    return min(max(5, (side + 1) // 2), side - 1)


class EvaluationNetwork(nn.Module):
    """The discrete network of a genotype.

    Args:
        genotype: The cells.
        num_classes: Classes.
        channels: Channels of the nodes of the first cells: 36 for CIFAR, 48 for ImageNet.
        num_cells: Cells: 20 for CIFAR, 14 for ImageNet; numbers `num_cells // 3` and `2 * num_cells // 3`, counted from
            0, are reduction cells.
        in_channels: Channels of the images.
        auxiliary: Whether there is an auxiliary head, on the output of cell `2 * num_cells // 3`.
        stem: `"cifar"` keeps the resolution, `"imagenet"` divides it by 8.

    Attributes:
        shape: The arguments, for `export_network`.

    Raises:
        ValueError: The stem is unknown, or `channels` or `num_cells` too small.

    Example:
        >>> import torch
        >>> from problems.search_spaces.genotypes import PUBLISHED
        >>> network = EvaluationNetwork(PUBLISHED["PDARTS"], num_classes=10, channels=4, num_cells=3).eval()
        >>> network(torch.zeros(2, 3, 16, 16)).main.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        genotype: Genotype,
        num_classes: int,
        channels: int = 36,
        num_cells: int = 20,
        in_channels: int = 3,
        *,
        auxiliary: bool = False,
        stem: Stem = "cifar",
    ) -> None:
        super().__init__()
        self.shape = NetworkShape(genotype, num_classes, channels, num_cells, in_channels, stem)
        self.stem = build_stem(stem, in_channels, channels, channels)
        shapes, out_channels = cell_shapes(
            self.stem.out_channels,
            channels,
            num_cells,
            num_normal_outputs=len(genotype.normal_concat),
            num_reduce_outputs=len(genotype.reduce_concat),
            stem_reduces=self.stem.reduces,
        )
        self.cells = nn.ModuleList(
            EvaluationCell(shape, genotype.reduce, genotype.reduce_concat)
            if shape.is_reduction
            else EvaluationCell(shape, genotype.normal, genotype.normal_concat)
            for shape in shapes
        )
        self.classifier = nn.Linear(out_channels, num_classes)
        self.auxiliary_cell = 2 * num_cells // 3
        self.auxiliary_head: AuxiliaryHead | None = None
        if auxiliary:
            head_channels = shapes[self.auxiliary_cell].channels * len(genotype.reduce_concat)
            self.auxiliary_head = AuxiliaryHead(head_channels, num_classes, final_norm=stem == "cifar")

    def forward(self, x: Tensor, drop_path_probability: float = 0.0) -> Logits:
        """Classify images.

        Args:
            x: Images, (batch, in_channels, height, width), of any size.
            drop_path_probability: Of dropping a branch for a sample, in [0, 1); has no effect in eval mode.

        Raises:
            ValueError: The probability is outside [0, 1), or the images are too small for the auxiliary head.
        """
        if not 0 <= drop_path_probability < 1:
            raise ValueError(f"expected 0 <= drop_path_probability < 1, got {drop_path_probability}")
        auxiliary: Tensor | None = None
        before_last, last = self.stem(x)
        for index, cell in enumerate(self.cells):
            before_last, last = last, cell(before_last, last, drop_path_probability)
            if index == self.auxiliary_cell and self.training and self.auxiliary_head is not None:
                auxiliary = self.auxiliary_head(last)
        return Logits(self.classifier(last.mean(dim=(2, 3))), auxiliary)
