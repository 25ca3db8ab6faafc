"""The supernet and the architecture that relaxes it: two modules, so that they can be two levels of a problem.

`Architecture` owns alpha and turns it into the weights of the primitives; `Supernet` owns the weights of the operations
and takes those of the primitives as an input. A loss calls `supernet(x, architecture())`.

Source: DARTS (Liu et al. 2019), sections 2.1, 2.2 and its published code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from problems.search_spaces.cells import SearchCell, cell_shapes
from problems.search_spaces.darts import DARTS, CellWeights, SearchSpace, check_weights, discretize
from problems.search_spaces.genotypes import Genotype
from problems.search_spaces.stems import CIFARStem

Relaxation = Callable[[Tensor], Tensor]
"""Maps an alpha of shape (edges, primitives) to the weights of the primitives, of the same shape."""


def softmax_relaxation(alpha: Tensor) -> Tensor:
    """Return the softmax of each edge's row (DARTS eq. (2))."""
    return alpha.softmax(dim=-1)


class Architecture(nn.Module):
    """The architecture variables of a search.

    Args:
        space: The search space; its shapes are those of alpha.
        relaxation: How alpha weights the primitives.

    Attributes:
        normal: Alpha of the normal cells, (edges, primitives), drawn from 0.001 * N(0, 1).
        reduce: Alpha of the reduction cells, likewise.
    """

    def __init__(self, space: SearchSpace = DARTS, *, relaxation: Relaxation = softmax_relaxation) -> None:
        super().__init__()
        self.space = space
        self.relaxation = relaxation
        self.normal = nn.Parameter(1e-3 * torch.randn(space.normal_shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(space.reduce_shape))

    def forward(self) -> CellWeights:
        """Return the relaxed weights, each of (edges, primitives)."""
        return CellWeights(self.relaxation(self.normal), self.relaxation(self.reduce))

    def discretize(self) -> Genotype:
        """Return the genotype of softmax(alpha), whatever the relaxation: sampled weights would name a random one."""
        return discretize(CellWeights(softmax_relaxation(self.normal), softmax_relaxation(self.reduce)), self.space)


class Supernet(nn.Module):
    """The weight-sharing network, in which every edge computes all its primitives.

    Args:
        num_classes: Classes.
        channels: Channels of the nodes of the first cells; the stem has three times as many.
        num_cells: Cells; numbers `num_cells // 3` and `2 * num_cells // 3`, counted from 0, are reduction cells. With
            one or two cells there is no normal cell.
        in_channels: Channels of the images.
        space: The search space.

    Raises:
        ValueError: `channels` or `num_cells` is less than 1.

    Example:
        >>> supernet = Supernet(num_classes=10, channels=4, num_cells=3, in_channels=1)
        >>> supernet(torch.zeros(2, 1, 8, 8), Architecture()()).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 16,
        num_cells: int = 8,
        in_channels: int = 3,
        *,
        space: SearchSpace = DARTS,
    ) -> None:
        super().__init__()
        self.space = space
        self.stem = CIFARStem(in_channels, channels)
        shapes, out_channels = cell_shapes(
            self.stem.out_channels,
            channels,
            num_cells,
            num_normal_outputs=space.num_nodes,
            num_reduce_outputs=space.num_nodes,
            stem_reduces=self.stem.reduces,
        )
        self.reductions = [shape.is_reduction for shape in shapes]
        self.cells = nn.ModuleList(
            SearchCell(shape, space.reduce if shape.is_reduction else space.normal) for shape in shapes
        )
        self.classifier = nn.Linear(out_channels, num_classes)

    def forward(self, x: Tensor, weights: CellWeights) -> Tensor:
        """Classify images.

        Args:
            x: Images, (batch, in_channels, height, width), of any size.
            weights: Relaxed weights, as `Architecture` returns them.

        Returns:
            Logits, (batch, num_classes).

        Raises:
            ValueError: The weights do not fit the search space.
        """
        check_weights(weights, self.space)
        before_last, last = self.stem(x)
        for cell, is_reduction in zip(self.cells, self.reductions, strict=True):
            before_last, last = last, cell(before_last, last, weights.reduce if is_reduction else weights.normal)
        logits: Tensor = self.classifier(last.mean(dim=(2, 3)))
        return logits
