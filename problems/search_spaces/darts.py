"""The DARTS search space: which primitives compete on which edge, and how their weights become a genotype.

`SearchSpace` is the declaration that the whole family shares: `supernet.Architecture` and `supernet.Supernet` are built
from one, `discretize` and `random_genotype` work on any. DARTS itself is the space `DARTS`; a space whose edges keep
fewer primitives, each edge its own, is another value of the same class; a space that ranks its edges by further weights
calls `discretize` with the products.

Source: DARTS (Liu et al. 2019), sections 2.1, 2.4 and 3.1 and its published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from problems.search_spaces.cells import CellPrimitives, incoming_edges
from problems.search_spaces.genotypes import NUM_INPUTS, Edge, Genotype
from problems.search_spaces.primitives import check_primitive

DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The primitives of DARTS, in the order of the columns of alpha."""


class CellWeights(NamedTuple):
    """What an architecture gives a supernet: the weight of each primitive on each edge, by type of cell."""

    normal: Tensor
    """(edges, primitives), shared by all normal cells."""
    reduce: Tensor
    """(edges, primitives), shared by all reduction cells."""
    normal_edges: Tensor | None = None
    """Of whole edges of the normal cells, (edges,) (PC-DARTS' beta after its softmax); None for 1."""
    reduce_edges: Tensor | None = None
    """The same for the reduction cells."""
    auxiliary_skip: float = 0.0
    """Weight of the skip-connection beside the primitives, see `EdgeState`."""
    skip_dropout: float = 0.0
    """Probability of dropping an element of an identity, see `EdgeState`."""
    sampled: bool = False
    """Whether the weights are one-hot rows, of which one primitive is to be computed."""


@dataclass(frozen=True)
class SearchSpace:
    """The primitives that compete on each edge of the two cells.

    Edges are ordered by target node, then by source node. All edges of a cell have equally many primitives, so that its
    alpha is a matrix; which ones they are may differ.

    Args:
        normal: For each edge of the normal cell the names of its primitives.
        reduce: The same for the reduction cell, of as many edges.

    Raises:
        ValueError: There is no such cell; the message says why.

    Example:
        >>> SearchSpace.uniform(("skip_connect", "sep_conv_3x3"), num_nodes=2).normal_shape
        (5, 2)
    """

    normal: CellPrimitives
    reduce: CellPrimitives

    def __post_init__(self) -> None:
        _check_cell("normal", self.normal)
        _check_cell("reduce", self.reduce)
        if len(self.normal) != len(self.reduce):
            raise ValueError(
                f"expected as many edges in both cells, got {len(self.normal)} in normal, {len(self.reduce)} in reduce"
            )

    @classmethod
    def uniform(cls, primitives: tuple[str, ...] = DARTS_PRIMITIVES, *, num_nodes: int = 4) -> SearchSpace:
        """Build the space in which all edges have the same primitives.

        Args:
            primitives: Their names.
            num_nodes: Nodes of a cell besides its two inputs, at least 1.

        Raises:
            ValueError: `num_nodes` is less than 1, or a primitive is unknown or repeated.
        """
        if num_nodes < 1:
            raise ValueError(f"expected num_nodes >= 1, got {num_nodes}")
        num_edges = sum(range(NUM_INPUTS, NUM_INPUTS + num_nodes))
        return cls((primitives,) * num_edges, (primitives,) * num_edges)

    @property
    def num_nodes(self) -> int:
        """Nodes of a cell besides its two inputs."""
        return len(incoming_edges(len(self.normal)))

    @property
    def normal_shape(self) -> tuple[int, int]:
        """Shape of the normal cell's alpha: (edges, primitives)."""
        return len(self.normal), len(self.normal[0])

    @property
    def reduce_shape(self) -> tuple[int, int]:
        """Shape of the reduction cell's alpha: (edges, primitives)."""
        return len(self.reduce), len(self.reduce[0])


def _check_cell(cell: str, primitives: CellPrimitives) -> None:
    incoming_edges(len(primitives))
    for index, names in enumerate(primitives):
        if len(names) != len(primitives[0]):
            raise ValueError(
                f"{cell}, edge {index}: expected {len(primitives[0])} primitives, as on edge 0, got {len(names)}"
            )
        for name in names:
            check_primitive(name)
        if len(set(names)) < len(names):
            raise ValueError(f"{cell}, edge {index}: a primitive is repeated in {names}")
        if not set(names) - {"none"}:
            raise ValueError(f"{cell}, edge {index}: expected at least one primitive besides none, got {names}")


DARTS = SearchSpace.uniform()
"""The search space of DARTS: eight primitives on each of the 14 edges of a cell of four nodes."""


def check_weights(weights: CellWeights, space: SearchSpace) -> None:
    """Refuse weights that do not fit a search space.

    Raises:
        ValueError: A shape differs from the space's.
    """
    for cell, tensor, expected, edges in (
        ("normal", weights.normal, space.normal_shape, weights.normal_edges),
        ("reduce", weights.reduce, space.reduce_shape, weights.reduce_edges),
    ):
        if tensor.shape != expected:
            raise ValueError(f"weights.{cell}: expected (edges, primitives) = {expected}, got {tuple(tensor.shape)}")
        if edges is not None and edges.shape != expected[:1]:
            raise ValueError(f"weights.{cell}_edges: expected (edges,) = {expected[:1]}, got {tuple(edges.shape)}")


def discretize(weights: CellWeights, space: SearchSpace = DARTS, *, max_skips: int | None = None) -> Genotype:
    """Read the genotype off relaxed weights (DARTS section 2.4).

    Each node keeps the two edges whose largest weight, `none` aside, is largest; each of these keeps the primitive of
    that weight. Ties go to the lower source node and to the earlier primitive. As in the published genotypes, the
    stronger edge of a node comes first.

    Args:
        weights: One number for each primitive of each edge, comparable within a node: softmax(alpha) in DARTS.
        space: Whose primitives they weigh.
        max_skips: The most skip-connections that the normal cell may have, or None. As long as it has more, the weakest
            of them is left out, and edges and primitives are chosen again (P-DARTS, section 3.3).

    Raises:
        ValueError: The shapes are not those of `space`, a weight is not finite, or the space has not enough other
            primitives for `max_skips`, or that is negative.
    """
    check_weights(weights, space)
    if max_skips is not None and max_skips < 0:
        raise ValueError(f"expected max_skips >= 0 or None, got {max_skips}")
    concat = tuple(range(NUM_INPUTS, NUM_INPUTS + space.num_nodes))
    rows = {cell: _rows(cell, matrix) for cell, matrix in (("normal", weights.normal), ("reduce", weights.reduce))}
    normal = _choose(rows["normal"], space.normal)
    while max_skips is not None and len(skips := [c for c in normal if c.primitive == "skip_connect"]) > max_skips:
        weakest = min(skips, key=lambda choice: choice.weight)
        if weakest.weight == _LEFT_OUT:
            raise ValueError(f"expected a space with enough primitives for max_skips = {max_skips}, got {space.normal}")
        rows["normal"][weakest.edge][space.normal[weakest.edge].index("skip_connect")] = _LEFT_OUT
        normal = _choose(rows["normal"], space.normal)
    return Genotype(
        normal=tuple((choice.primitive, choice.source) for choice in normal),
        normal_concat=concat,
        reduce=tuple((choice.primitive, choice.source) for choice in _choose(rows["reduce"], space.reduce)),
        reduce_concat=concat,
    )


_LEFT_OUT = float("-inf")
"""The weight of a primitive that is out of the question."""


class _Choice(NamedTuple):
    weight: float
    primitive: str
    edge: int
    source: int


def _rows(cell: str, weights: Tensor) -> list[list[float]]:
    if not weights.isfinite().all():
        raise ValueError(f"weights.{cell}: expected finite numbers, got {weights.tolist()}")
    rows: list[list[float]] = weights.tolist()
    return rows


def _choose(rows: list[list[float]], primitives: CellPrimitives) -> list[_Choice]:
    chosen: list[_Choice] = []
    for incoming in incoming_edges(len(primitives)):
        best = [_Choice(*_best_primitive(rows[edge], primitives[edge]), edge, source) for edge, source in incoming]
        # The sort is stable, hence ties go to the lower source.
        chosen += sorted(best, key=lambda choice: choice.weight, reverse=True)[:2]
    return chosen


def _best_primitive(weights: list[float], names: tuple[str, ...]) -> tuple[float, str]:
    candidates = [(weight, name) for weight, name in zip(weights, names, strict=True) if name != "none"]
    return max(candidates, key=lambda candidate: candidate[0])  # the first of equals


def random_genotype(generator: torch.Generator, space: SearchSpace = DARTS) -> Genotype:
    """Draw two distinct sources for each node, and for each of these edges a primitive other than `none`, uniformly.

    Args:
        generator: The source of all randomness.
        space: Where to draw from.
    """
    concat = tuple(range(NUM_INPUTS, NUM_INPUTS + space.num_nodes))
    return Genotype(
        normal=_random_cell(generator, space.normal),
        normal_concat=concat,
        reduce=_random_cell(generator, space.reduce),
        reduce_concat=concat,
    )


def _random_cell(generator: torch.Generator, primitives: CellPrimitives) -> tuple[Edge, ...]:
    device = generator.device
    edges: list[Edge] = []
    for incoming in incoming_edges(len(primitives)):
        chosen = torch.randperm(len(incoming), generator=generator, device=device)[:2].tolist()
        for edge, source in (incoming[index] for index in sorted(chosen)):
            names = [name for name in primitives[edge] if name != "none"]
            choice = int(torch.randint(len(names), (), generator=generator, device=device))
            edges.append((names[choice], source))
    return tuple(edges)
