"""Where the parts of a discrete cell go in its picture: a layered layout, from left to right.

Each operation is an item of its own, in the column just before the node that it feeds. A line that must pass a column
goes through a *bend* there, which takes up room like any other item; so lines run between items, never across one. The
steps are the classic ones (Sugiyama, Tagawa and Toda 1981): columns by longest path, few crossings by repeated
barycenters, then heights that keep lines straight. `problems.search_spaces.drawing` calls it; nothing here draws.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# In inches: between two items of a column, and between two lines that meet an item.
_CLEARANCE = 0.13
_PORT = 0.13
# The room for lines between two columns, in inches: more where they have to climb.
_SLOPE = 0.42
_MIN_GAP, _MAX_GAP = 0.36, 1.0
# Effort. Ten times as many starts find no fewer crossings for any of the published genotypes.
_NUM_STARTS = 24
_NUM_SWEEPS = 8
_NUM_RELAXATIONS = 30


@dataclass(eq=False)
class Item:
    """A node, an operation or a bend: a box around (x, y), y growing downwards, in inches.

    Attributes:
        kind: `"input"`, `"node"`, `"output"`, `"operation"` or `"bend"`.
        index: Of the node, or of the edge whose operation it is; 0 for the output and for bends.
        width: In inches; zero for a bend.
        height: In inches; zero for a bend. `lay_out` makes it larger where many lines meet the item.
        x: Of the centre; set by `lay_out`.
        y: Of the centre; set by `lay_out`.
        before: The items that lines come from, from top to bottom.
        after: The items that lines go to, from top to bottom.
    """

    kind: str
    index: int
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    before: list[Item] = field(default_factory=list)
    after: list[Item] = field(default_factory=list)

    def entry(self, source: Item) -> float:
        """The height at which the line from `source` arrives."""
        return self.y + _port(self.before, source)

    def exit(self, target: Item) -> float:
        """The height at which the line to `target` leaves."""
        return self.y + _port(self.after, target)


@dataclass(frozen=True)
class Layout:
    """A laid-out cell; its upper left corner is the origin.

    Attributes:
        columns: The items by column, each from top to bottom.
        lines: For each edge the items on its way from its source through its operation to its target; then, for each
            member of the concatenation, those on its way to the output.
        sides: The left and the right border of each column, in inches.
        height: In inches.
    """

    columns: list[list[Item]]
    lines: list[list[Item]]
    sides: list[tuple[float, float]]
    height: float


def lay_out(
    sources: Sequence[int],
    concat: Sequence[int],
    *,
    terminal: tuple[float, float],
    node: tuple[float, float],
    operation: tuple[float, float],
) -> Layout:
    """Lay out a cell.

    Args:
        sources: For each edge its source node; edges 2i and 2i + 1 feed node i + 2, and nodes 0 and 1 are the inputs.
        concat: The nodes that feed the output.
        terminal: Width and height of the inputs and of the output, in inches.
        node: Width and height of the other nodes, in inches.
        operation: Width and height of an operation, in inches.

    Returns:
        The layout with the fewest crossings found and, among those, the straightest.
    """
    columns, lines = _build(sources, concat, terminal, node, operation)
    orders = _orders(columns)
    fewest = min(map(_num_crossings, orders))
    best = min((order for order in orders if _num_crossings(order) == fewest), key=lambda order: _place(order, lines))
    _place(best, lines)
    top = min(item.y - item.height / 2 for column in best for item in column)
    for column in best:
        for item in column:
            item.y -= top
    return Layout(
        columns=best,
        lines=lines,
        sides=_spread(best),
        height=max(item.y + item.height / 2 for column in best for item in column),
    )


def _build(
    sources: Sequence[int],
    concat: Sequence[int],
    terminal: tuple[float, float],
    node: tuple[float, float],
    operation: tuple[float, float],
) -> tuple[list[list[Item]], list[list[Item]]]:
    """Make the items, by column in no good order, and the lines between them."""
    nodes = [Item("input", 0, *terminal), Item("input", 1, *terminal)]
    place = [0, 0]  # the column of each node: inputs, operations, nodes, operations, nodes, ..., output
    for first, second in zip(sources[::2], sources[1::2], strict=True):
        place.append(max(place[first], place[second]) + 2)
        nodes.append(Item("node", len(nodes), *node))
    columns: list[list[Item]] = [[] for _ in range(max(place) + 2)]
    for item, column in zip(nodes, place, strict=True):
        columns[column].append(item)
    output = Item("output", 0, *terminal)
    columns[-1].append(output)

    def bends(start: int, stop: int) -> list[Item]:
        made = [Item("bend", 0) for _ in range(start, stop)]
        for column, bend in zip(columns[start:stop], made, strict=True):
            column.append(bend)
        return made

    lines = []
    for edge, source in enumerate(sources):
        target = edge // 2 + 2
        box = Item("operation", edge, *operation)
        columns[place[target] - 1].append(box)
        lines.append([nodes[source], *bends(place[source] + 1, place[target] - 1), box, nodes[target]])
    lines += [[nodes[member], *bends(place[member] + 1, len(columns) - 1), output] for member in concat]
    for line in lines:
        for left, right in itertools.pairwise(line):
            left.after.append(right)
            right.before.append(left)
    for item in [*nodes, output]:
        item.height = max(item.height, _PORT * (max(len(item.before), len(item.after)) + 0.5))
    return columns, lines


def _orders(columns: list[list[Item]]) -> list[list[list[Item]]]:
    """Candidate orders of every column, the first input on top, found by sweeps of barycenters from several starts."""
    found: dict[tuple[tuple[Item, ...], ...], None] = {}
    for start in range(_NUM_STARTS):
        shuffle = random.Random(start).shuffle  # the same starts each time
        order = [list(column) for column in columns]
        for column in order[:-1]:
            shuffle(column)
        for sweep in range(_NUM_SWEEPS):
            forward = sweep % 2 == 0
            pairs = list(itertools.pairwise(order if forward else order[::-1]))
            for fixed, free in pairs:
                rank = {item: float(index) for index, item in enumerate(fixed)}
                free.sort(key=lambda item: _barycenter(item.before if forward else item.after, rank))
            upright = order if order[0][0].index == 0 else [column[::-1] for column in order]
            found[tuple(map(tuple, upright))] = None
    return [[list(column) for column in order] for order in found]


def _barycenter(neighbours: Sequence[Item], rank: dict[Item, float]) -> float:
    return sum(rank[item] for item in neighbours) / len(neighbours) if neighbours else len(rank) / 2


def _num_crossings(columns: Sequence[Sequence[Item]]) -> int:
    total = 0
    for left, right in itertools.pairwise(columns):
        rank = {item: index for index, item in enumerate(right)}
        ends = [rank[target] for source in left for target in sorted(source.after, key=rank.__getitem__)]
        total += sum(upper > lower for upper, lower in itertools.combinations(ends, 2))
    return total


def _place(columns: Sequence[Sequence[Item]], lines: Sequence[Sequence[Item]]) -> float:
    """Set the heights that make the lines of these columns straight, and return how far the lines still climb.

    Given the heights in the other columns, those in one that minimize the squared climbs are an isotonic regression;
    taking the columns in turn converges to the minimum over all of them.
    """
    for left, right in itertools.pairwise(columns):
        for item in left:
            item.after.sort(key=right.index)
        for item in right:
            item.before.sort(key=left.index)
    for column in columns:
        for index, item in enumerate(column):
            item.y = index - len(column) / 2
    pulls = {item: _pulls(item) for column in columns for item in column}
    forth = range(len(columns))
    for index in itertools.chain.from_iterable([*forth, *reversed(forth)] for _ in range(_NUM_RELAXATIONS)):
        column = columns[index]
        rooms = [(upper.height + lower.height) / 2 + _CLEARANCE for upper, lower in itertools.pairwise(column)]
        depths = list(itertools.accumulate(rooms, initial=0.0))
        wishes = []
        for item, depth in zip(column, depths, strict=True):
            total = sum(weight for _, _, weight in pulls[item])
            height = sum((other.y + offset) * weight for other, offset, weight in pulls[item]) / total
            wishes.append((height - depth, total))
        for item, value, depth in zip(column, _isotonic(wishes), depths, strict=True):
            item.y = value + depth
    for line in lines:
        _straighten([item for item in line if item.kind == "bend"], columns)
    return sum(map(abs, _climbs(columns)))


def _straighten(bends: Sequence[Item], columns: Sequence[Sequence[Item]]) -> None:
    """Put the bends of one line at one height, near that of one of its ends, where the columns have room for it."""
    if not bends:
        return
    highs, lows = zip(*(_room(bend, columns) for bend in bends), strict=True)
    if max(highs) > min(lows):
        return
    (before,), (after,) = bends[0].before, bends[-1].after
    ends = (before.exit(bends[0]), after.entry(bends[-1]))
    fits = [min(max(end, *highs), *lows) for end in ends]
    height = min(fits, key=lambda fit: sum(abs(fit - end) for end in ends))
    for bend in bends:
        bend.y = height


def _room(item: Item, columns: Sequence[Sequence[Item]]) -> tuple[float, float]:
    """The heights that an item can have between its neighbours in its column."""
    column = next(column for column in columns if item in column)
    index = column.index(item)
    high, low = -math.inf, math.inf
    if index > 0:
        high = column[index - 1].y + (column[index - 1].height + item.height) / 2 + _CLEARANCE
    if index < len(column) - 1:
        low = column[index + 1].y - (column[index + 1].height + item.height) / 2 - _CLEARANCE
    return high, low


def _pulls(item: Item) -> list[tuple[Item, float, float]]:
    """What draws an item to a height: a neighbour, how far below it the line between them is level, how strongly."""
    level = [(other, _port(other.after, item) - _port(item.before, other)) for other in item.before]
    level += [(other, _port(other.before, item) - _port(item.after, other)) for other in item.after]
    # An item without lines stays where it is.
    return [(other, offset, _stiffness(item, other)) for other, offset in level] or [(item, 0.0, 1.0)]


def _stiffness(one: Item, other: Item) -> float:
    """Long lines should be straight where they pass columns; an operation may lie beside its node."""
    return (1.0, 3.0, 8.0)[(one.kind == "bend") + (other.kind == "bend")]


def _isotonic(wishes: Sequence[tuple[float, float]]) -> list[float]:
    """The non-decreasing sequence nearest to the wished values, by weight: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in wishes:
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, low_weight, low_size), (high, high_weight, high_size) = pools[-2:]
            total = low_weight + high_weight
            pools[-2:] = [((low * low_weight + high * high_weight) / total, total, low_size + high_size)]
    return [value for value, _, size in pools for _ in range(size)]


def _port(neighbours: list[Item], neighbour: Item) -> float:
    return _PORT * (neighbours.index(neighbour) - (len(neighbours) - 1) / 2)


def _climbs(columns: Sequence[Sequence[Item]]) -> Iterator[float]:
    for column in columns:
        for item in column:
            for target in item.after:
                yield target.entry(item) - item.exit(target)


def _spread(columns: Sequence[Sequence[Item]]) -> list[tuple[float, float]]:
    """Set where the columns are, with room between them for the lines, and return their sides."""
    sides = []
    left = 0.0
    for column in columns:
        right = left + max(item.width for item in column)
        sides.append((left, right))
        for item in column:
            item.x = (left + right) / 2
        climb = max(map(abs, _climbs([column])), default=0.0)
        left = right + min(_MAX_GAP, max(_MIN_GAP, _SLOPE * climb))
    return sides
