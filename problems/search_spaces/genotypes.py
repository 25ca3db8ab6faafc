"""Genotypes: discrete cells as immutable data, and the published ones by name.

A search ends in a `Genotype` (see `darts.discretize`); `evaluation.EvaluationNetwork` is built from one; recipes and
reports store it as JSON.

Source: DARTS (Liu et al. 2019), section 2.4 and its published code; P-DARTS (Chen et al. 2019); PC-DARTS (Xu et al.
2020); NASNet (Zoph et al. 2018); AmoebaNet (Real et al. 2019).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from problems.search_spaces.primitives import check_primitive

Edge = tuple[str, int]
"""An edge of a discrete cell: its primitive and the node that it reads."""

NUM_INPUTS = 2
"""A cell reads the outputs of the two cells before it, as nodes 0 and 1; its own nodes count from 2."""


@dataclass(frozen=True)
class Genotype:
    """One normal and one reduction cell, each node the sum of two edges.

    Args:
        normal: The edges of the normal cell, two for each of its nodes in turn: the first two make node 2.
        normal_concat: The nodes whose concatenation is the output of the normal cell.
        reduce: The edges of the reduction cell.
        reduce_concat: The nodes whose concatenation is the output of the reduction cell.

    Raises:
        ValueError: The data describe no cell; the message says which edge or node, and what was expected.

    Example:
        >>> PUBLISHED["DARTS_V2"].normal[-1]
        ('dil_conv_3x3', 2)
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_cell("normal", self.normal, self.normal_concat)
        _check_cell("reduce", self.reduce, self.reduce_concat)

    def to_json(self) -> dict[str, object]:
        """Return the genotype as a dictionary of plain lists, which `json.dumps` accepts."""
        return {
            "normal": [list(edge) for edge in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(edge) for edge in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Genotype:
        """Build a genotype from what `to_json` returned.

        Args:
            data: The four fields, by name, as lists.

        Raises:
            ValueError: A field is missing, unknown or of another form, or the data describe no cell.
        """
        expected = [field.name for field in fields(cls)]
        if sorted(data) != sorted(expected):
            raise ValueError(
                f"a genotype has the fields {', '.join(expected)}; got {', '.join(map(str, data)) or 'none'}"
            )
        return cls(
            normal=_parse_edges("normal", data["normal"]),
            normal_concat=_parse_concat("normal_concat", data["normal_concat"]),
            reduce=_parse_edges("reduce", data["reduce"]),
            reduce_concat=_parse_concat("reduce_concat", data["reduce_concat"]),
        )


def _check_cell(name: str, edges: tuple[Edge, ...], concat: tuple[int, ...]) -> None:
    if not edges or len(edges) % 2:
        raise ValueError(f"{name}: expected two edges for each node, got {len(edges)} edges in all")
    for index, (primitive, source) in enumerate(edges):
        node = NUM_INPUTS + index // 2
        try:
            check_primitive(primitive)
        except ValueError as error:
            raise ValueError(f"{name}, edge {index} into node {node}: {error}") from None
        if not 0 <= source < node:
            raise ValueError(
                f"{name}, edge {index} into node {node}: expected a source node from 0 to {node - 1}, got {source}"
            )
    last = NUM_INPUTS + len(edges) // 2 - 1
    if not concat or len(set(concat)) < len(concat) or not all(NUM_INPUTS <= node <= last for node in concat):
        raise ValueError(f"{name}_concat: expected distinct nodes from {NUM_INPUTS} to {last}, got {concat}")


def _parse_edges(field: str, data: object) -> tuple[Edge, ...]:
    if not isinstance(data, list) or not all(map(_is_edge, data)):
        raise ValueError(f"{field}: expected a list of [primitive, source node] pairs, got {data!r}")
    return tuple((primitive, source) for primitive, source in data)


def _is_edge(data: object) -> bool:
    return isinstance(data, list) and [type(item) for item in data] == [str, int]


def _parse_concat(field: str, data: object) -> tuple[int, ...]:
    if not isinstance(data, list) or not all(type(node) is int for node in data):
        raise ValueError(f"{field}: expected a list of nodes, got {data!r}")
    return tuple(data)


# fmt: off
PUBLISHED: Mapping[str, Genotype] = MappingProxyType(
    {
        "DARTS_V1": Genotype(
            normal=(
                ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
                ("skip_connect", 0), ("sep_conv_3x3", 1),
                ("skip_connect", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 0), ("skip_connect", 2),
            ),
            normal_concat=(2, 3, 4, 5),
            reduce=(
                ("max_pool_3x3", 0), ("max_pool_3x3", 1),
                ("skip_connect", 2), ("max_pool_3x3", 0),
                ("max_pool_3x3", 0), ("skip_connect", 2),
                ("skip_connect", 2), ("avg_pool_3x3", 0),
            ),
            reduce_concat=(2, 3, 4, 5),
        ),
        "DARTS_V2": Genotype(
            normal=(
                ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 1), ("skip_connect", 0),
                ("skip_connect", 0), ("dil_conv_3x3", 2),
            ),
            normal_concat=(2, 3, 4, 5),
            reduce=(
                ("max_pool_3x3", 0), ("max_pool_3x3", 1),
                ("skip_connect", 2), ("max_pool_3x3", 1),
                ("max_pool_3x3", 0), ("skip_connect", 2),
                ("skip_connect", 2), ("max_pool_3x3", 1),
            ),
            reduce_concat=(2, 3, 4, 5),
        ),
        "PDARTS": Genotype(
            normal=(
                ("skip_connect", 0), ("dil_conv_3x3", 1),
                ("skip_connect", 0), ("sep_conv_3x3", 1),
                ("sep_conv_3x3", 1), ("sep_conv_3x3", 3),
                ("sep_conv_3x3", 0), ("dil_conv_5x5", 4),
            ),
            normal_concat=(2, 3, 4, 5),
            reduce=(
                ("avg_pool_3x3", 0), ("sep_conv_5x5", 1),
                ("sep_conv_3x3", 0), ("dil_conv_5x5", 2),
                ("max_pool_3x3", 0), ("dil_conv_3x3", 1),
                ("dil_conv_3x3", 1), ("dil_conv_5x5", 3),
            ),
            reduce_concat=(2, 3, 4, 5),
        ),
        "PC_DARTS_cifar": Genotype(
            normal=(
                ("sep_conv_3x3", 1), ("skip_connect", 0),
                ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
                ("sep_conv_5x5", 0), ("sep_conv_3x3", 1),
                ("avg_pool_3x3", 0), ("dil_conv_3x3", 1),
            ),
            normal_concat=(2, 3, 4, 5),
            reduce=(
                ("sep_conv_5x5", 1), ("max_pool_3x3", 0),
                ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
                ("sep_conv_3x3", 0), ("sep_conv_3x3", 3),
                ("sep_conv_3x3", 1), ("sep_conv_3x3", 2),
            ),
            reduce_concat=(2, 3, 4, 5),
        ),
        "PC_DARTS_image": Genotype(
            normal=(
                ("skip_connect", 1), ("sep_conv_3x3", 0),
                ("sep_conv_3x3", 0), ("skip_connect", 1),
                ("sep_conv_3x3", 1), ("sep_conv_3x3", 3),
                ("sep_conv_3x3", 1), ("dil_conv_5x5", 4),
            ),
            normal_concat=(2, 3, 4, 5),
            reduce=(
                ("sep_conv_3x3", 0), ("skip_connect", 1),
                ("dil_conv_5x5", 2), ("max_pool_3x3", 1),
                ("sep_conv_3x3", 2), ("sep_conv_3x3", 1),
                ("sep_conv_5x5", 0), ("sep_conv_3x3", 3),
            ),
            reduce_concat=(2, 3, 4, 5),
        ),
        "NASNet": Genotype(
            normal=(
                ("sep_conv_5x5", 1), ("sep_conv_3x3", 0),
                ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
                ("avg_pool_3x3", 1), ("skip_connect", 0),
                ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
                ("sep_conv_3x3", 1), ("skip_connect", 1),
            ),
            normal_concat=(2, 3, 4, 5, 6),
            reduce=(
                ("sep_conv_5x5", 1), ("sep_conv_7x7", 0),
                ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
                ("avg_pool_3x3", 1), ("sep_conv_5x5", 0),
                ("skip_connect", 3), ("avg_pool_3x3", 2),
                ("sep_conv_3x3", 2), ("max_pool_3x3", 1),
            ),
            reduce_concat=(4, 5, 6),
        ),
        "AmoebaNet": Genotype(
            normal=(
                ("avg_pool_3x3", 0), ("max_pool_3x3", 1),
                ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
                ("sep_conv_3x3", 0), ("avg_pool_3x3", 3),
                ("sep_conv_3x3", 1), ("skip_connect", 1),
                ("skip_connect", 0), ("avg_pool_3x3", 1),
            ),
            normal_concat=(4, 5, 6),
            reduce=(
                ("avg_pool_3x3", 0), ("sep_conv_3x3", 1),
                ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
                ("sep_conv_7x7", 0), ("avg_pool_3x3", 1),
                ("max_pool_3x3", 0), ("max_pool_3x3", 1),
                ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5),
            ),
            reduce_concat=(3, 4, 6),
        ),
    }
)
"""The published genotypes by name; a line of edges makes a node."""
# fmt: on


def find_genotype(name: str) -> Genotype:
    """Return a published genotype.

    Raises:
        ValueError: There is none of that name; the message gives the nearest.

    Example:
        >>> find_genotype("PDARTS").normal[0]
        ('skip_connect', 0)
    """
    if name not in PUBLISHED:
        nearest = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown genotype {name!r}: {hint}The published ones are {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
