"""The supernet and the architecture that relaxes it: two modules, so that they can be two levels of a problem.

`Architecture` owns alpha and turns it into the weights of the primitives; `Supernet` owns the weights of the operations
and takes those of the primitives as an input. A loss calls `supernet(x, architecture(progress))`.

Source: DARTS (Liu et al. 2019), sections 2.1, 2.2 and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from problems.search_spaces.cells import (
    EdgeOperation,
    EdgeState,
    MixedOperation,
    SearchCell,
    cell_shapes,
    incoming_edges,
)
from problems.search_spaces.darts import DARTS, CellWeights, SearchSpace, check_weights, discretize
from problems.search_spaces.fused import FusedCell
from problems.search_spaces.genotypes import Genotype
from problems.search_spaces.recomputation import Recomputed
from problems.search_spaces.relaxations import SOFTMAX, Relaxation
from problems.search_spaces.stems import STEM_MULTIPLIER, Stem, build_stem


class Architecture(nn.Module):
    """The architecture variables of a search.

    Args:
        space: The search space; its shapes are those of alpha.
        relaxation: How alpha weights the primitives.
        edge_normalization: Whether there is a beta beside alpha, whose softmax over the edges into each node weights
            whole edges (PC-DARTS, Xu et al. 2020, section 3.3).
        skip_dropout: The probability of dropping an element of an identity, as a function of the progress of the
            search.

    Attributes:
        normal: Alpha of the normal cells, (edges, primitives), drawn from 0.001 * N(0, 1).
        reduce: Alpha of the reduction cells, likewise.
        normal_beta: Beta of the normal cells, (edges,), likewise; only with `edge_normalization`.
        reduce_beta: Beta of the reduction cells, likewise.
    """

    def __init__(
        self,
        space: SearchSpace = DARTS,
        *,
        relaxation: Relaxation = SOFTMAX,
        edge_normalization: bool = False,
        skip_dropout: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.relaxation = relaxation
        self.skip_dropout = skip_dropout
        self.normal = nn.Parameter(1e-3 * torch.randn(space.normal_shape))
        self.reduce = nn.Parameter(1e-3 * torch.randn(space.reduce_shape))
        self.normal_beta: nn.Parameter | None = None
        self.reduce_beta: nn.Parameter | None = None
        if edge_normalization:
            self.normal_beta = nn.Parameter(1e-3 * torch.randn(space.normal_shape[0]))
            self.reduce_beta = nn.Parameter(1e-3 * torch.randn(space.reduce_shape[0]))

    # Under torch.compile: a graph for each progress of the search.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, progress: float = 0.0) -> CellWeights:
        """Return what a supernet takes as its second argument.

        Args:
            progress: Fraction of the search that is done, in [0, 1).
        """
        return CellWeights(
            self.relaxation.weights(self.normal, progress),
            self.relaxation.weights(self.reduce, progress),
            None if self.normal_beta is None else _edge_weights(self.normal_beta),
            None if self.reduce_beta is None else _edge_weights(self.reduce_beta),
            self.relaxation.auxiliary_skip(progress),
            self.skip_dropout(progress) if self.skip_dropout is not None else 0.0,
            self.relaxation.samples,
        )

    def penalty(self) -> Tensor:
        """Return what the relaxation adds to the architecture's loss, a scalar."""
        return self.relaxation.penalty(self.normal) + self.relaxation.penalty(self.reduce)

    def scores(self) -> CellWeights:
        """Return what discretization compares, within a node: the relaxation's scores, times the edges' weights."""
        normal, reduce = (
            self.relaxation.scores(alpha) * (1.0 if beta is None else _edge_weights(beta).unsqueeze(1))
            for alpha, beta in ((self.normal, self.normal_beta), (self.reduce, self.reduce_beta))
        )
        return CellWeights(normal, reduce)

    def discretize(self, *, max_skips: int | None = None) -> Genotype:
        """Return the genotype of the scores.

        Args:
            max_skips: The most skip-connections that the normal cell may have, or None.
        """
        return discretize(self.scores(), self.space, max_skips=max_skips)


def _edge_weights(beta: Tensor) -> Tensor:
    """The softmax of beta over the edges into each node, (edges,)."""
    sizes = [len(incoming) for incoming in incoming_edges(len(beta))]
    return torch.cat([part.softmax(dim=0) for part in torch.split(beta, sizes)])


class Supernet(nn.Module):
    """The weight-sharing network, in which every edge computes all its primitives.

    Args:
        num_classes: Classes.
        channels: Channels of the nodes of the first cells; the stem has three times as many.
        num_cells: Cells; numbers `num_cells // 3` and `2 * num_cells // 3`, counted from 0, are reduction cells. With
            one or two cells there is no normal cell.
        in_channels: Channels of the images.
        space: The search space.
        operation: Builds an edge; `MixedOperation`, or for partial channels `pc_darts.PartialOperation`.
        cell: Builds a cell; `FusedCell`, or `SearchCell`, which computes the same edge by edge, and more slowly.
        auxiliary_skip: Whether every edge has a skip-connection beside its primitives; needed by a relaxation that
            weights it.
        stem: `"cifar"` keeps the resolution, `"imagenet"` divides it by 8; it has three times `channels`.
        checkpointing: Keep the inputs of the cells only, and compute what is in them again in a backward pass.

    Raises:
        ValueError: `channels` or `num_cells` is less than 1, or the stem is unknown.

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
        operation: Callable[..., nn.Module] = MixedOperation,
        cell: Callable[..., SearchCell] = FusedCell,
        auxiliary_skip: bool = False,
        stem: Stem = "cifar",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.space = space
        self.auxiliary_skip = auxiliary_skip
        self.stem = build_stem(stem, in_channels, channels, STEM_MULTIPLIER * channels)
        build_edge: EdgeOperation = partial(operation, auxiliary_skip=auxiliary_skip)
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
            cell(shape, space.reduce if shape.is_reduction else space.normal, build_edge) for shape in shapes
        )
        self.classifier = nn.Linear(out_channels, num_classes)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, weights: CellWeights) -> Tensor:
        """Classify images.

        Args:
            x: Images, (batch, in_channels, height, width), of any size.
            weights: Relaxed weights, as `Architecture` returns them.

        Returns:
            Logits, (batch, num_classes).

        Raises:
            ValueError: The weights do not fit the search space, or weight a skip-connection that is not there.
        """
        check_weights(weights, self.space)
        if weights.auxiliary_skip and not self.auxiliary_skip:
            raise ValueError("the relaxation weights an auxiliary skip-connection: expected auxiliary_skip=True")
        normal_states, reduce_states = _edge_states(weights)
        before_last, last = self.stem(x)
        for module, is_reduction in zip(self.cells, self.reductions, strict=True):
            cell = Recomputed(module) if self.checkpointing else module
            if is_reduction:
                output = cell(before_last, last, weights.reduce, weights.reduce_edges, reduce_states)
            else:
                output = cell(before_last, last, weights.normal, weights.normal_edges, normal_states)
            before_last, last = last, output
        logits: Tensor = self.classifier(functional.avg_pool2d(last, last.shape[2:]).flatten(1))
        return logits


def _edge_states(weights: CellWeights) -> tuple[list[EdgeState], list[EdgeState]]:
    """What each edge of a normal and of a reduction cell is told."""
    chosen: list[list[int | None]] = [[None] * len(weights.normal), [None] * len(weights.reduce)]
    if weights.sampled:
        both = torch.cat((weights.normal.detach().argmax(dim=1), weights.reduce.detach().argmax(dim=1))).tolist()
        chosen = [both[: len(weights.normal)], both[len(weights.normal) :]]
    normal, reduce = (
        [EdgeState(index, weights.auxiliary_skip, weights.skip_dropout) for index in row] for row in chosen
    )
    return normal, reduce
