"""What a fused cell runs as one: found out once, for the modules that the cell holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from problems.search_spaces.branches import Norm

BLOCK = 4
"""Modules of a block of a separable or dilated primitive: ReLU, depthwise convolution, 1 x 1 convolution, BatchNorm."""


class Leaving(NamedTuple):
    """An edge out of a node."""

    edge: int
    source: int
    target: int
    """Numbered without the inputs of the cell."""


class Group(NamedTuple):
    """Those edges of a stage that have a primitive in common."""

    name: str
    members: tuple[int, ...]
    """Their places among the edges of the stage."""
    columns: tuple[int, ...]
    """The place of the primitive among those of each."""
    modules: tuple[Any, ...]
    """What computes it on each."""
    channels: int
    """Of a separable or dilated convolution; 0 for all else."""
    dilation: int
    """Of its depthwise convolution."""
    norms: tuple[tuple[Norm, ...], ...]
    """Of each block of it, those of each edge."""

    @classmethod
    def of(cls, name: str, found: Sequence[tuple[int, int, Any]]) -> Group:
        """Gather members, columns and modules."""
        members, columns, modules = zip(*found, strict=True)
        first = modules[0]
        if not (channels := _channels(first)):
            return cls(name, members, columns, modules, 0, 1, ())
        dilation = first[1].dilation[0] if len(first) == BLOCK else 1
        norms = tuple(tuple(module[last] for module in modules) for last in range(BLOCK - 1, len(first), BLOCK))
        return cls(name, members, columns, modules, channels, dilation, norms)


class Stage(NamedTuple):
    """Nodes that are there at the same time, and what leaves them."""

    sources: tuple[int, ...]
    leaving: tuple[Leaving, ...]
    """Source by source."""
    convolutions: tuple[Group, ...]
    others: tuple[Group, ...]
    """Each of the edges out of one source; skip-connections left out."""


class Plan:
    """The stages of a cell, and where their convolutions find their kernels and their scales.

    Args:
        edges: Of the cell.
        stages: The edges of each stage, source by source.
    """

    def __init__(self, edges: Sequence[Any], stages: Sequence[Sequence[Leaving]]) -> None:
        self.stages = [_stage(edges, leaving) for leaving in stages]
        self._chosen = [
            (stage.leaving[member].edge, column)
            for stage in self.stages
            for group in stage.convolutions
            for member, column in zip(group.members, group.columns, strict=True)
        ]
        groups = [group for stage in self.stages for group in stage.convolutions]
        self._channels = groups[0].channels if groups else 0
        self._sizes = [len(group.members) * group.channels for group in groups]
        kinds: dict[Any, tuple[list[nn.Conv2d], list[int], list[int]]] = {}
        self._num_kernels = 0
        for group in groups:
            for place in _convolutions(group.modules[0]):
                modules = [module[place] for module in group.modules]
                owners, places, sizes = kinds.setdefault(modules[0].kernel_size, ([], [], []))
                owners += modules
                places.append(self._num_kernels)
                sizes.append(len(modules) * group.channels)
                self._num_kernels += 1
        self._kinds = list(kinds.values())

    def kernels(self) -> Iterator[Tensor]:
        """Return those of each group, depthwise and 1 x 1 of one block after the other; put together a size at a time.

        Each is of shape (edges * channels, 1 or channels, k, k).
        """
        found: list[Any] = [None] * self._num_kernels
        for owners, places, sizes in self._kinds:
            parts = torch.split(torch.cat([owner.weight for owner in owners]), sizes)
            for place, part in zip(places, parts, strict=True):
                found[place] = part
        return iter(found)

    def scales(self, scalars: Sequence[Tensor], count: int) -> Iterator[Tensor]:
        """Return the scales of the channels of each group, given those of `count` primitives an edge.

        All at once: convolutions have the same channels everywhere in a cell.
        """
        if not self._chosen:
            return iter(())
        chosen = torch.stack([scalars[edge * count + column] for edge, column in self._chosen])
        return iter(torch.split(chosen.repeat_interleave(self._channels), self._sizes))


def _stage(edges: Sequence[Any], leaving: Sequence[Leaving]) -> Stage:
    having: dict[tuple[str, int], list[tuple[int, int, Any]]] = {}
    for member, out in enumerate(leaving):
        for column, name in enumerate(edges[out.edge].primitives):
            if name not in ("none", "skip_connect"):
                module = edges[out.edge].operations[name]
                key = name, -1 if _channels(module) else out.source
                having.setdefault(key, []).append((member, column, module))
    groups = [Group.of(name, found) for (name, _), found in having.items()]
    return Stage(
        tuple(dict.fromkeys(out.source for out in leaving)),
        tuple(leaving),
        tuple(group for group in groups if group.channels),
        tuple(group for group in groups if not group.channels),
    )


def _channels(module: Any) -> int:
    """Return how many a separable or dilated convolution has, 0 for anything else."""
    pools = isinstance(module[0], nn.MaxPool2d | nn.AvgPool2d)
    return 0 if pools or module[2].kernel_size != (1, 1) else module[2].out_channels


def _convolutions(module: Any) -> list[int]:
    return [place for place in range(len(module)) if place % BLOCK in (1, 2)]
