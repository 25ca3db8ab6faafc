"""The search cell with everything shared that its edges have in common: the same numbers for a fraction of the work.

`FusedCell` has the parameters, the buffers and the state dict of `SearchCell`, and its values to rounding. It saves:

- All edges out of a node rectify and pool the same input, and normalize the pools alike: once, here.
- Where images are small, or kernels are what limits (on GPUs), their convolutions run as one, with a group for each
  edge.
- A convolution of dilation 2 never mixes odd and even rows or columns: on the four quarters of an image that these make
  it is a plain convolution, for which the kernels are better. Dilated branches are put together from quarters only
  after they have been added up at a node.
- The weight of a branch is the scale of its last BatchNorm, so that no copy of the branch is kept for its gradient.
- Channels that pass an edge by (PC-DARTS) are added up before they are shuffled.
- Sums are formed in place, and nothing is computed for `none`; branches that run as one are added up side by side, and
  taken apart once for all primitives.

Where there is less to share it does what `SearchCell` does: in evaluation mode, with sampled edges, with edges of other
classes or modules of other settings than it was built with, and where modules have hooks (those of normalizations are
not called).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from problems.search_spaces.branches import (
    Images,
    Statistics,
    add_products,
    are_alike,
    concatenate,
    join,
    pool,
    quarter,
    settings_of,
)
from problems.search_spaces.cells import PLAIN, CellPrimitives, CellShape, EdgeOperation, MixedOperation, SearchCell
from problems.search_spaces.depthwise import depthwise, is_channels_last
from problems.search_spaces.genotypes import NUM_INPUTS
from problems.search_spaces.pc_darts import PartialOperation, shuffle_channels
from problems.search_spaces.primitives import FactorizedReduce, every_second

_CACHED = 1 << 21
"""Numbers in the branches that run as one on a CPU; measured, with 16 to 64 images of 32 x 32 pixels."""
BLOCK = 4
"""Modules of a block of a separable or dilated primitive: ReLU, depthwise convolution, 1 x 1 convolution, BatchNorm."""


class FusedCell(SearchCell):
    """`SearchCell`, faster; the masks of `skip_dropout` are drawn in another order.

    Args:
        shape: As for `SearchCell`.
        primitives: As for `SearchCell`.
        operation: As for `SearchCell`.
    """

    def __init__(self, shape: CellShape, primitives: CellPrimitives, operation: EdgeOperation = MixedOperation) -> None:
        super().__init__(shape, primitives, operation)
        self.outgoing = [
            [(edge, target) for target, incoming in enumerate(self.incoming) for edge, s in incoming if s == source]
            for source in range(NUM_INPUTS + len(self.incoming) - 1)
        ]
        self.strides = [shape.stride(source) for source in range(len(self.outgoing))]
        self._built = self._settings()
        self._look_over()

    def _settings(self) -> list[Any]:
        """Return what the edges consist of, or nothing where one is of another class or not like the others."""
        edges: list[Any] = list(self.edges)
        kinds = {(type(edge), getattr(edge, "k", 1)) for edge in edges}
        if len(kinds) != 1 or next(iter(kinds))[0] not in (MixedOperation, PartialOperation):
            return []
        averages = [[settings_of(part) for part in edge.modules() if isinstance(part, nn.AvgPool2d)] for edge in edges]
        return [(edge.primitives, str(edge), own) for edge, own in zip(edges, averages, strict=True)]

    def _look_over(self) -> None:
        """Find out whether the edges can be computed together, and how; anew whenever modules have changed."""
        owners = list(self.edges.modules())
        self._held = [(owner._modules, dict(owner._modules)) for owner in (self, *owners)]
        normalizing = nn.modules.batchnorm._BatchNorm
        self._norms = [part for part in owners if isinstance(part, normalizing)]
        self._hooks = [  # not those of normalizations
            hooks
            for owner in owners
            if not isinstance(owner, normalizing)
            for hooks in (
                owner._forward_hooks, owner._forward_pre_hooks, owner._backward_hooks, owner._backward_pre_hooks,
            )
        ]  # fmt: skip
        self.fusable = bool(self._built) and self._settings() == self._built
        self._groups = [self._groups_of([edge for edge, _ in out]) for out in self.outgoing] if self.fusable else []

    # Under torch.compile: a graph for each number of edges and each layout would take long to make, and gain nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        before_last: Tensor,
        last: Tensor,
        weights: Tensor,
        edge_weights: Tensor | None = None,
        states: Any = None,
    ) -> Tensor:
        """As `SearchCell.forward`."""
        if any(present != held for present, held in self._held):
            self._look_over()
        sampled = states is not None and any(state.chosen is not None for state in states)
        hooked = any(self._hooks) or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        if sampled or not self.fusable or hooked or not are_alike(self._norms):
            return super().forward(before_last, last, weights, edge_weights, states)
        like = self._norms[0].running_mean if self._norms else None
        if like is None:
            like = next(self.edges.parameters(), weights)
        weights = weights.to(like.dtype)
        edge_weights = None if edge_weights is None else edge_weights.to(like.dtype)
        nodes: list[Tensor] = self.preprocess(before_last, last)
        if edge_weights is not None:
            weights = weights * edge_weights.unsqueeze(1)
        count, scalars = weights.shape[1], weights.reshape(-1).unbind()
        whole = edge_weights.unbind() if edge_weights is not None else None
        sums = [_Sum() for _ in self.incoming]
        statistics = Statistics()
        scales = iter(self._scales(scalars, count))
        for source, leaving in enumerate(self.outgoing):
            if source >= NUM_INPUTS:
                nodes.append(sums[source - NUM_INPUTS].node())
            edges = [
                _Edge(
                    self.edges[edge],
                    sums[target],
                    scalars[edge * count : (edge + 1) * count],
                    None if whole is None else whole[edge],
                    *(states[edge] if states else PLAIN)[1:],
                )
                for edge, target in leaving
            ]
            _Source(nodes[source], self.strides[source], statistics).feed(edges, self._groups[source], scales)
        nodes.append(sums[-1].node())
        statistics.write()
        return concatenate(nodes[NUM_INPUTS:])

    def _scales(self, scalars: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return the scales of the channels of each group of convolutions, given those of `count` primitives an edge.

        All at once: convolutions have the same channels everywhere in a cell.
        """
        groups = [group for groups in self._groups for group in groups if group.channels]
        if not groups:
            return ()
        chosen = [
            scalars[edge * count + column]
            for group in groups
            for edge, column in zip(group.edges, group.columns, strict=True)
        ]
        channels = groups[0].channels
        sizes = [len(group.edges) * channels for group in groups]
        return torch.split(torch.stack(chosen).repeat_interleave(channels), sizes)

    def _groups_of(self, leaving: Sequence[int]) -> list[_Group]:
        """Return the groups of the edges out of a node, skip-connections left out."""
        having: dict[str, list[tuple[int, int, int]]] = {}
        for member, edge in enumerate(leaving):
            for column, name in enumerate(self.edges[edge].primitives):  # type: ignore[arg-type]
                if name not in ("none", "skip_connect"):
                    having.setdefault(name, []).append((edge, member, column))
        found = []
        for name, places in having.items():
            edges, members, columns = zip(*places, strict=True)
            module: Any = self.edges[edges[0]].operations[name]
            convolves = not _is_pool(module[0]) and module[2].kernel_size == (1, 1)
            found.append(_Group(name, edges, members, columns, module[2].out_channels if convolves else 0))
        return found


class _Group(NamedTuple):
    """Those edges out of a node that have a primitive in common."""

    name: str
    edges: tuple[int, ...]
    """Of the cell."""
    members: tuple[int, ...]
    """Their places among the edges out of the node."""
    columns: tuple[int, ...]
    """The place of the primitive among those of each."""
    channels: int
    """Of a separable or dilated convolution; 0 for all else."""


def _is_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d)


class _Edge(NamedTuple):
    """One edge out of a node."""

    operation: Any
    sum: _Sum
    """Of the node that it leads to."""
    row: Sequence[Tensor]
    """The weight of each primitive, that of the edge included."""
    weight: Tensor | None
    """That of the edge, None for 1."""
    auxiliary_skip: float
    skip_dropout: float

    @property
    def k(self) -> int:
        """One in k channels is operated on."""
        return self.operation.k if isinstance(self.operation, PartialOperation) else 1


class _Sum:
    """What is added up at a node, in place."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None
        self.quarters: Tensor | None = None
        self.passing: Tensor | None = None
        self.k = 1

    def add(self, branch: Tensor, *, is_part: bool = False, in_quarters: bool = False) -> None:
        """Add a branch.

        Args:
            branch: The first one is written into later.
            is_part: Whether it is a part of a tensor that has others, too, and must stay as it is.
            in_quarters: See `Images`.
        """
        before = self.quarters if in_quarters else self.whole
        if before is not None:
            before.add_(branch)
            return
        first = branch.clone() if is_part else branch
        if in_quarters:
            self.quarters = first
        else:
            self.whole = first

    def add_passing(self, edge: _Edge, x: Tensor) -> None:
        """Add channels that are not operated on."""
        self.k = edge.k
        weighted = x if edge.weight is None else x * edge.weight
        self.passing = weighted if self.passing is None else self.passing + weighted

    def node(self) -> Tensor:
        """Return the node."""
        if self.quarters is not None:
            self.add(join(self.quarters))
        node = self.whole
        assert node is not None  # a search space has a primitive besides `none` on each edge
        if self.passing is None:
            return node
        shuffled = shuffle_channels(torch.cat((node, self.passing), dim=1), self.k)
        return shuffled.contiguous(memory_format=torch.channels_last) if is_channels_last(node) else shuffled


class _Source:
    """A node whose outgoing edges are computed together.

    Args:
        x: Its value.
        stride: Of all edges out of it.
        statistics: Of the batch.
    """

    def __init__(self, x: Tensor, stride: int, statistics: Statistics) -> None:
        self.x = x
        self.stride = stride
        self.statistics = statistics
        # A CPU gains by groups as long as its caches hold them.
        self.num_grouped = max(1, _CACHED // max(1, x.numel())) if x.device.type == "cpu" else 1 << 30
        self.images: dict[int, Images] = {}
        self.products: list[tuple[_Edge, Tensor, Tensor]] = []
        self.found: dict[tuple[bool, tuple[int, ...]], tuple[Sequence[_Edge], Tensor]] = {}

    def feed(self, edges: Sequence[_Edge], groups: Sequence[_Group], scales: Iterator[Tensor]) -> None:
        """Add to the sum of each edge what the edge makes of this node.

        Args:
            edges: Out of the node.
            groups: Of them.
            scales: Of the channels of each group of convolutions.
        """
        k = edges[0].k
        if k > 1:
            self._pass_by(edges, self.x[:, self.x.shape[1] // k :])
            self.x = self.x[:, : self.x.shape[1] // k]
        self.rectified = functional.relu(self.x)
        self._skip(edges)
        for group in groups:
            some = [edges[member] for member in group.members]
            modules = [edge.operation.operations[group.name] for edge in some]
            if group.channels:
                self._convolve_in_parts(some, [tuple(module) for module in modules], next(scales))
                continue
            if _is_pool(modules[0][0]):
                pooled = self.statistics.normalize_alike(pool(modules[0][0], self.x), [module[1] for module in modules])
                branches = [pooled] * len(some)
            else:
                branches = [module(self.x) for module in modules]
            self.products += [
                (edge, branch, edge.row[column])
                for edge, branch, column in zip(some, branches, group.columns, strict=True)
            ]
        self._multiply()
        self._hand_over()

    def _add(self, edges: Sequence[_Edge], branches: Tensor, *, in_quarters: bool = False) -> None:
        """Add branches of several edges, side by side; they are taken apart once, after all have been added up."""
        key = in_quarters, tuple(map(id, edges))
        if key in self.found:
            self.found[key][1].add_(branches)
        else:
            self.found[key] = (edges, branches)

    def _multiply(self) -> None:
        """Add the products of tensors, which several edges may have in common, and scalars."""
        if not self.products:
            return
        edges = list({id(edge): edge for edge, _, _ in self.products}.values())
        tensors = list({id(x): x for _, x, _ in self.products}.values())
        rows, columns = ({id(each): i for i, each in enumerate(group)} for group in (edges, tensors))
        places = [(rows[id(edge)], columns[id(x)]) for edge, x, _ in self.products]
        scales = [scale for _, _, scale in self.products]
        sums = add_products([edge.sum.whole for edge in edges], tensors, scales, places)
        for edge, found in zip(edges, sums, strict=True):
            edge.sum.whole = found

    def _hand_over(self) -> None:
        for (in_quarters, _), (edges, branches) in self.found.items():
            several = len(edges) > 1
            parts = branches.chunk(len(edges), dim=1) if several else (branches,)
            for edge, part in zip(edges, parts, strict=True):
                edge.sum.add(part, is_part=several, in_quarters=in_quarters)

    def _pass_by(self, edges: Sequence[_Edge], passing: Tensor) -> None:
        if self.stride == 2:
            passing = functional.max_pool2d(passing, 2, ceil_mode=True)
        for edge in edges:
            edge.sum.add_passing(edge, passing)

    def _skip(self, edges: Sequence[_Edge]) -> None:
        """Add skip-connections, those beside the primitives included."""
        reducing: list[tuple[_Edge, FactorizedReduce, Tensor]] = []
        for edge in edges:
            mixed = edge.operation
            skips = []
            if "skip_connect" in mixed.operations:
                scale = edge.row[mixed.primitives.index("skip_connect")]
                skips.append((mixed.operations["skip_connect"], scale, edge.skip_dropout))
            if mixed.auxiliary is not None:
                scale = self.x.new_ones(()) if edge.weight is None else edge.weight
                skips.append((mixed.auxiliary, edge.auxiliary_skip * scale, 0.0))
            for operation, scale, dropout in skips:
                if isinstance(operation, FactorizedReduce):
                    reducing.append((edge, operation, scale))
                else:
                    kept = functional.dropout(self.x, dropout, operation.training) if dropout else self.x
                    self.products.append((edge, kept, scale))
        for first in range(0, len(reducing), self.num_grouped):
            self._reduce(reducing[first : first + self.num_grouped])

    def _reduce(self, skips: Sequence[tuple[_Edge, FactorizedReduce, Tensor]]) -> None:
        even, odd = FactorizedReduce.halves(self.rectified)
        of_even = functional.conv2d(even, _cat([operation.even.weight for _, operation, _ in skips]))
        of_odd = functional.conv2d(odd, _cat([operation.odd.weight for _, operation, _ in skips]))
        pairs = zip(of_even.chunk(len(skips), dim=1), of_odd.chunk(len(skips), dim=1), strict=True)
        joined = torch.cat([half for pair in pairs for half in pair], dim=1)
        norms = [operation.norm for _, operation, _ in skips]
        scales = torch.stack([scale for _, _, scale in skips]).repeat_interleave(joined.shape[1] // len(skips))
        branches = self.statistics.normalize(joined, norms, scales)
        self._add([edge for edge, _, _ in skips], branches)

    def _convolve_in_parts(self, edges: Sequence[_Edge], operations: Sequence[Sequence[Any]], scales: Tensor) -> None:
        """Run the convolutions of as many edges at once as pays."""
        num = self.num_grouped
        parts = [scales] if num >= len(edges) else torch.split(scales, num * (len(scales) // len(edges)))
        for first, part in zip(range(0, len(edges), num), parts, strict=True):
            self._convolve(edges[first : first + num], operations[first : first + num], part)

    def _convolve(self, edges: Sequence[_Edge], operations: Sequence[Sequence[Any]], scales: Tensor) -> None:
        """Run (ReLU, depthwise convolution, 1 x 1 convolution, BatchNorm), once or more, for several edges."""
        num_blocks = len(operations[0]) // BLOCK
        images = self._images(operations[0][1].dilation[0] if num_blocks == 1 else 1)
        y = images.repeated(len(edges))
        for block in range(num_blocks):
            parts = [operation[BLOCK * block : BLOCK * (block + 1)] for operation in operations]
            if block > 0:
                y = functional.relu(y, inplace=True)
            y = depthwise(
                y, _cat([part[1].weight for part in parts]), images.stride if block == 0 else 1, images.dilation
            )
            y = functional.conv2d(y, _cat([part[2].weight for part in parts]), groups=len(edges))
            norms = [part[3] for part in parts]
            y = self.statistics.normalize(y, norms, scales if block == num_blocks - 1 else None)
        self._add(edges, y, in_quarters=images.in_quarters)

    def _images(self, dilation: int) -> Images:
        """What a convolution reads, rectified, so that it is a plain one where that is possible."""
        if dilation not in self.images:
            x = self.rectified
            if dilation != 2:
                found = Images(x, self.stride, dilation)
            elif self.stride == 2:  # with dilation 2 it reads even rows and columns only
                found = Images(every_second(x, 0), 1, 1)
            elif x.shape[2] % 2 or x.shape[3] % 2:
                found = Images(x, 1, 2)
            else:
                found = Images(quarter(x), 1, 1, in_quarters=True)
            self.images[dilation] = found
        return self.images[dilation]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
