"""The cells of both networks: the relaxed one of a supernet and the discrete one of an evaluation network.

A cell reads the outputs of the two cells before it (nodes 0 and 1), adds up its edges at each further node, and returns
the concatenation of nodes. What the two kinds of cell share stands first: the shapes along a network, and the
preprocessing of the inputs.

Source: DARTS (Liu et al. 2019), sections 2.1, 2.2 and its published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from problems.search_spaces.genotypes import NUM_INPUTS, Edge
from problems.search_spaces.primitives import PRIMITIVES, FactorizedReduce, relu_conv_norm

CellPrimitives = tuple[tuple[str, ...], ...]
"""The names of the primitives that compete on each edge of a cell; edges are ordered by target node, then by source."""


@dataclass(frozen=True)
class CellShape:
    """How a cell fits into its network.

    Args:
        in_channels: Channels of the outputs of the last cell but one and of the last cell.
        channels: Channels of every node of this cell.
        is_reduction: Whether this cell halves the resolution.
        follows_reduction: Whether the last cell did, so that the output of the last but one is twice as large.
    """

    in_channels: tuple[int, int]
    channels: int
    is_reduction: bool
    follows_reduction: bool

    def stride(self, source: int) -> int:
        """Return the stride of an edge from node `source`: a reduction cell strides on its inputs only."""
        return 2 if self.is_reduction and source < NUM_INPUTS else 1


def cell_shapes(
    stem_channels: tuple[int, int],
    channels: int,
    num_cells: int,
    *,
    num_normal_outputs: int,
    num_reduce_outputs: int,
    stem_reduces: bool,
) -> tuple[list[CellShape], int]:
    """Lay out a network: cells `num_cells // 3` and `2 * num_cells // 3` reduce and double the channels.

    As in the published code, networks of one or two cells have reduction cells only.

    Args:
        stem_channels: Channels of the two outputs of the stem.
        channels: Channels of the nodes of the first cells.
        num_cells: How many cells, at least 1.
        num_normal_outputs: How many nodes a normal cell concatenates.
        num_reduce_outputs: How many nodes a reduction cell concatenates.
        stem_reduces: Whether the first output of the stem is twice as large as the second.

    Returns:
        The shape of each cell, and the channels of the output of the last one.

    Raises:
        ValueError: `channels` or `num_cells` is less than 1.
    """
    if channels < 1 or num_cells < 1:
        raise ValueError(f"expected channels >= 1 and num_cells >= 1, got {channels} and {num_cells}")
    shapes: list[CellShape] = []
    in_channels, follows_reduction = stem_channels, stem_reduces
    for index in range(num_cells):
        is_reduction = index in (num_cells // 3, 2 * num_cells // 3)
        channels = 2 * channels if is_reduction else channels
        shapes.append(CellShape(in_channels, channels, is_reduction, follows_reduction))
        num_outputs = num_reduce_outputs if is_reduction else num_normal_outputs
        in_channels, follows_reduction = (in_channels[1], num_outputs * channels), is_reduction
    return shapes, in_channels[1]


class Preprocess(nn.Module):
    """Bring the two inputs of a cell to its channels and to the same resolution."""

    def __init__(self, shape: CellShape, *, affine: bool) -> None:
        super().__init__()
        before_last, last = shape.in_channels
        bring = FactorizedReduce if shape.follows_reduction else relu_conv_norm
        self.before_last = bring(before_last, shape.channels, affine)
        self.last = relu_conv_norm(last, shape.channels, affine)

    def forward(self, before_last: Tensor, last: Tensor) -> list[Tensor]:
        """Return nodes 0 and 1, each of (batch, channels, height, width)."""
        return [self.before_last(before_last), self.last(last)]


class EdgeState(NamedTuple):
    """What a search tells an edge beside the weights of its primitives."""

    chosen: int | None = None
    """The only primitive to be computed; None for all."""
    auxiliary_skip: float = 0.0
    """Weight of the skip-connection beside the primitives (DARTS-, Chu et al. 2021)."""
    skip_dropout: float = 0.0
    """Probability of dropping an element of an identity (P-DARTS, Chen et al. 2019, section 3.3)."""


PLAIN = EdgeState()
"""The state of an edge of which nothing is told."""


class MixedOperation(nn.Module):
    """The relaxed edge: the weighted sum of its primitives (DARTS eq. (2)), without learnable BatchNorm parameters.

    Args:
        primitives: The competing primitives. `none` takes its share of the weight but adds nothing: it is not computed.
        channels: Channels of the input and of the output.
        stride: 1 or 2.
        auxiliary_skip: Whether there is a skip-connection beside the primitives.
    """

    def __init__(self, primitives: Sequence[str], channels: int, stride: int, *, auxiliary_skip: bool = False) -> None:
        super().__init__()
        self.primitives = tuple(primitives)
        self.stride = stride
        self.operations = nn.ModuleDict(
            {name: _search_operation(name, channels, stride) for name in self.primitives if name != "none"}
        )

        self.auxiliary = _search_operation("skip_connect", channels, stride) if auxiliary_skip else None

    def forward(self, x: Tensor, weights: Tensor, state: EdgeState = PLAIN) -> Tensor:
        """Map (batch, channels, height, width) and weights of (primitives,) to the weighted sum of the branches."""
        branches = [
            weight * self._branch(name, x, state)
            for index, (name, weight) in enumerate(zip(self.primitives, weights.unbind(), strict=True))
            if (name != "none" if state.chosen is None else index == state.chosen)
        ]
        if self.auxiliary is not None:
            branches.append(state.auxiliary_skip * self.auxiliary(x))
        total: Tensor = reduce(torch.add, branches)
        return total

    def _branch(self, name: str, x: Tensor, state: EdgeState) -> Tensor:
        if name == "none":  # chosen
            return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])
        operation = self.operations[name]
        branch: Tensor = operation(x)
        if state.skip_dropout > 0 and isinstance(operation, nn.Identity):
            branch = functional.dropout(branch, state.skip_dropout, self.training)
        return branch


def _search_operation(name: str, channels: int, stride: int) -> nn.Module:
    operation = PRIMITIVES[name](channels, stride, False)
    if isinstance(operation, nn.MaxPool2d | nn.AvgPool2d):
        # Pools end in no BatchNorm of their own, and without one their scale would not compare with the others'.
        return nn.Sequential(operation, nn.BatchNorm2d(channels, affine=False))
    return operation


class EdgeOperation(Protocol):
    """Builds a relaxed edge: a module that is called with the input, the weights and an `EdgeState`."""

    def __call__(self, primitives: Sequence[str], channels: int, stride: int) -> nn.Module:
        """Build it, see `MixedOperation`."""


class SearchCell(nn.Module):
    """The relaxed cell: every node reads every earlier one, and all nodes are concatenated.

    Args:
        shape: How the cell fits into its network.
        primitives: The primitives of each edge: 2 edges into the first node, 3 into the second, and so on.
        operation: Builds an edge, `(primitives, channels, stride) -> module`.
    """

    def __init__(self, shape: CellShape, primitives: CellPrimitives, operation: EdgeOperation = MixedOperation) -> None:
        super().__init__()
        self.incoming = incoming_edges(len(primitives))
        self.preprocess = Preprocess(shape, affine=False)
        self.edges = nn.ModuleList(
            operation(primitives[edge], shape.channels, shape.stride(source))
            for incoming in self.incoming
            for edge, source in incoming
        )

    def forward(
        self,
        before_last: Tensor,
        last: Tensor,
        weights: Tensor,
        edge_weights: Tensor | None = None,
        states: Sequence[EdgeState] | None = None,
    ) -> Tensor:
        """Run the cell.

        Args:
            before_last: Output of the last cell but one, (batch, channels, height, width).
            last: Output of the last cell.
            weights: Relaxed weights, (edges, primitives).
            edge_weights: Of whole edges, (edges,), or None for 1.
            states: Of each edge, or None.

        Returns:
            (batch, nodes * channels, height, width), the sides halved by a reduction cell.
        """
        nodes: list[Tensor] = self.preprocess(before_last, last)
        rows = weights.unbind()
        factors = edge_weights.unbind() if edge_weights is not None else None
        for incoming in self.incoming:
            branches = []
            for edge, source in incoming:
                branch = self.edges[edge](nodes[source], rows[edge], states[edge] if states else PLAIN)
                branches.append(branch if factors is None else factors[edge] * branch)
            nodes.append(reduce(torch.add, branches))
        return torch.cat(nodes[NUM_INPUTS:], dim=1)


def incoming_edges(num_edges: int) -> list[list[tuple[int, int]]]:
    """Return for each node of a search cell the edges into it, as pairs of edge and source node.

    Raises:
        ValueError: No cell has `num_edges` edges.

    Example:
        >>> incoming_edges(5)
        [[(0, 0), (1, 1)], [(2, 0), (3, 1), (4, 2)]]
    """
    nodes: list[list[tuple[int, int]]] = []
    first_edge = 0
    while first_edge < num_edges:
        num_sources = NUM_INPUTS + len(nodes)
        nodes.append([(first_edge + source, source) for source in range(num_sources)])
        first_edge += num_sources
    if not nodes or first_edge != num_edges:
        raise ValueError(f"a search cell of 1, 2, 3, 4, ... nodes has 2, 5, 9, 14, ... edges; got {num_edges}")
    return nodes


class EvaluationCell(nn.Module):
    """The discrete cell: two edges into each node.

    Args:
        shape: How the cell fits into its network.
        edges: Primitive and source of each edge, two for each node in turn.
        concat: The nodes to concatenate.
    """

    def __init__(self, shape: CellShape, edges: Sequence[Edge], concat: Sequence[int]) -> None:
        super().__init__()
        self.sources = tuple(source for _, source in edges)
        self.concat = tuple(concat)
        self.preprocess = Preprocess(shape, affine=True)
        self.operations = nn.ModuleList(
            PRIMITIVES[name](shape.channels, shape.stride(source), True) for name, source in edges
        )

    def forward(self, before_last: Tensor, last: Tensor, drop_path_probability: float) -> Tensor:
        """Run the cell.

        Args:
            before_last: Output of the last cell but one, (batch, channels, height, width).
            last: Output of the last cell.
            drop_path_probability: See `drop_path`; identities are never dropped, nor is anything in eval mode.

        Returns:
            (batch, len(concat) * channels, height, width), the sides halved by a reduction cell.
        """
        states: list[Tensor] = self.preprocess(before_last, last)
        branches: list[Tensor] = []
        for operation, source in zip(self.operations, self.sources, strict=True):
            branch = operation(states[source])
            if self.training and drop_path_probability > 0 and not isinstance(operation, nn.Identity):
                branch = drop_path(branch, drop_path_probability)
            branches.append(branch)
            if len(branches) == 2:
                states.append(branches[0] + branches[1])
                branches.clear()
        return torch.cat([states[node] for node in self.concat], dim=1)


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zero a branch for a random part of the samples and divide the rest by the keep probability.

    Args:
        x: (batch, channels, height, width).
        probability: Of dropping a sample, in [0, 1).

    Returns:
        A tensor of the shape and the expectation of `x`.

    Source: FractalNet (Larsson et al. 2017), as NASNet (Zoph et al. 2018) and DARTS use it.
    """
    keep = 1 - probability
    # Of tensors alone: a compiled module would be compiled anew for each number that it draws with.
    mask = torch.bernoulli(x.new_ones((x.shape[0], 1, 1, 1), dtype=torch.float32) * keep)
    return x * (mask.to(x.dtype) / keep)
