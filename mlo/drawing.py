"""The level graph, as text for the terminal and as a picture.

The picture stacks the levels from low (bottom) to high (top). Edges that carry a best response up run on the right,
those that make the problem nested run down on the left; neighbours are joined in the gap between them. `mlo graph`
calls both.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlo.figures import INK, MUTED, add_box, add_curve, house_style, inch_figure, save_figure, text_width, write

if TYPE_CHECKING:
    from mlo.graph import Edge, Graph
    from mlo.problem import Problem

UP = "#1668b0"
DOWN = "#c9480a"
DETACHED = "#8b95a1"

# In inches. An arc's port is where it meets the side of a box; its lane is how far out it swings.
_LINE_HEIGHT = 0.17
_HEADING_GAP = 0.05
_PADDING = 0.15
_GAP = 0.5
_PORT = 0.14
_FIRST_LANE = 0.45
_LANE = 0.2
_BEND = 0.6
_KEY = 0.45
_KEY_HEIGHT = 0.2
_MARGIN = 0.2
# How far out the controls of a cubic lie that draws a quarter of an ellipse of unit radius.
_ROUND = 0.5523


def describe_graph(graph: Graph) -> str:
    """Describe a graph for the terminal, the highest level first.

    Args:
        graph: The graph.

    Returns:
        For each level its module, optimizer, steps, how its best response is differentiated, what it reads, what is
        solved inside it, and, if any, where it starts, which options other levels set, and its micro-batches; lines
        without a newline at the end of the last.
    """
    blocks = [f"{_count(len(graph.levels), 'level')}, {_count(len(graph.edges), 'edge')}, highest level first"]
    for level in reversed(graph.levels):
        inside = graph.inside(level.name)
        reads = [edge.source + " (detached)" * edge.detached for edge in graph.edges if edge.target == level.name]
        rows = {
            "module": f"{type(level.module).__name__}, {_num_weights(level)}",
            "optimizer": f"{type(level.optimizer).__name__}, learning rate {_learning_rate(level)}",
            "steps": str(level.steps),
            "best response": _best_response(graph, level),
            "reads": ", ".join(reads) or "nothing",
            "solves inside": ", ".join(other.name for other in graph.levels if other.name in inside) or "nothing",
        }
        if level.start is not None:
            rows["starts at"] = level.start
        if level.hyperparameters:
            rows["set by others"] = ", ".join(level.hyperparameters)
        if level.warmup_rounds:
            rows["warm-up"] = f"{level.warmup_rounds} rounds"
        if level.micro_batches > 1:
            rows["micro-batches"] = str(level.micro_batches)
        blocks.append("\n".join([level.name, *(f"  {key:<15}{value}" for key, value in rows.items())]))
    return "\n\n".join(blocks)


def draw_graph(graph: Graph, path: str | Path) -> None:
    """Write a picture of a graph.

    Args:
        graph: The graph.
        path: Where to write; the suffix (`.png`, `.svg` or `.pdf`) is the format.

    Raises:
        MloError: If the suffix names another format.
    """
    save_figure(graph_figure(graph), path)


@house_style
def graph_figure(graph: Graph) -> Figure:
    """Draw a graph on a figure of the size that it needs.

    Args:
        graph: The graph.

    Returns:
        The figure; `draw_graph` writes it.
    """
    texts = [_box_lines(graph, level) for level in graph.levels]
    left, right = _Side(graph, up=False), _Side(graph, up=True)
    ports = [max(pair) for pair in zip(left.num_ports, right.num_ports, strict=True)]
    box_width = max(text_width(line, _size(row), _weight(row)) for lines in texts for row, line in enumerate(lines))
    box_width += 2 * _PADDING
    heights = [
        max(_HEADING_GAP + len(lines) * _LINE_HEIGHT + 2 * _PADDING, (num + 1) * _PORT)
        for lines, num in zip(texts, ports, strict=True)
    ]
    keys = _legend(graph)
    keys_width = max((_KEY + text_width(text, 8.0) for _, _, text in keys), default=0.0)
    keys_height = len(keys) * _KEY_HEIGHT + _MARGIN if keys else 0.0

    # The legend may be wider than the boxes with their arcs.
    width = max(left.width + box_width + right.width, keys_width) + 2 * _MARGIN
    figure, axes = inch_figure(width, sum(heights) + _GAP * (len(heights) - 1) + 2 * _MARGIN + keys_height)
    middle = (width + left.width - right.width) / 2
    bottom = _MARGIN + keys_height
    centers = []
    for lines, height in zip(texts, heights, strict=True):
        centers.append(bottom + height / 2)
        bottom += height + _GAP
        add_box(axes, (middle, centers[-1]), (box_width, height), fill="#f5f7fa", line=MUTED)
        _write_lines(axes, lines, (middle, centers[-1]))
    _draw_neighbours(axes, graph, middle, centers, heights)
    left.draw(axes, middle - box_width / 2, centers)
    right.draw(axes, middle + box_width / 2, centers)
    _draw_legend(axes, keys, ((width - keys_width) / 2, _MARGIN))
    return figure


@dataclass(frozen=True)
class _Arc:
    """An edge between levels that are not neighbours; both are places in the stack, from 0 at the bottom."""

    source: int
    target: int
    detached: bool


class _Side:
    """The arcs on one side of the stack, each with a lane and with ports of its own.

    A longer arc swings further out than every shorter one that it overlaps, and ports are ordered so that nested arcs
    do not cross.
    """

    def __init__(self, graph: Graph, *, up: bool) -> None:
        position = {level.name: index for index, level in enumerate(graph.levels)}
        arcs = [_Arc(position[edge.source], position[edge.target], edge.detached) for edge in graph.edges]
        self.arcs = [arc for arc in arcs if abs(arc.source - arc.target) > 1 and (arc.source < arc.target) == up]
        self.arcs.sort(key=lambda arc: (abs(arc.source - arc.target), min(arc.source, arc.target)))
        self._sign = 1.0 if up else -1.0
        self._color = UP if up else DOWN
        self._lanes: list[int] = []
        for index, arc in enumerate(self.arcs):
            below = [lane for other, lane in zip(self.arcs[:index], self._lanes, strict=True) if _overlap(arc, other)]
            self._lanes.append(max(below, default=-1) + 1)
        self._ports = [self._port_order(level) for level in range(len(graph.levels))]
        self.num_ports = [len(ports) for ports in self._ports]
        self.width = _reach(max(self._lanes)) if self.arcs else 0.0

    def draw(self, axes: Axes, x: float, centers: Sequence[float]) -> None:
        """Draw the arcs from and to boxes whose side is at `x`."""
        for index, arc in enumerate(self.arcs):
            start, end = (self._port(index, level, centers[level]) for level in (arc.source, arc.target))
            color = DETACHED if arc.detached else self._color
            outer = x + self._sign * _reach(self._lanes[index])
            add_curve(axes, _bracket(x, outer, start, end), color, head=True, dashed=arc.detached)

    def _port_order(self, level: int) -> list[int]:
        """The arcs that meet a box, from its lowest port: those going down, shortest last; then those going up."""
        down = [index for index, arc in enumerate(self.arcs) if max(arc.source, arc.target) == level]
        up = [index for index, arc in enumerate(self.arcs) if min(arc.source, arc.target) == level]
        return [*down, *reversed(up)]

    def _port(self, index: int, level: int, center: float) -> float:
        order = self._ports[level]
        return center + (order.index(index) - (len(order) - 1) / 2) * _PORT


def _reach(lane: int) -> float:
    return _FIRST_LANE + _LANE * lane


def _bracket(x: float, outer: float, start: float, end: float) -> list[tuple[float, float]]:
    """A curve from (x, start) out to x = outer, along it, and back to (x, end).

    Each corner is a quarter of an ellipse. Ellipses of one height but of different width never meet when the wider
    starts beyond the narrower, which is what keeps nested arcs apart; single cubics to one box would cross twice.
    """
    bend = math.copysign(min(_BEND, abs(end - start) / 2), end - start)
    across, along = _ROUND * (outer - x), _ROUND * bend
    return [
        (x, start),
        *[(x + across, start), (outer, start + bend - along), (outer, start + bend)],
        *[(outer, start + bend), (outer, end - bend), (outer, end - bend)],
        *[(outer, end - bend + along), (x + across, end), (x, end)],
    ]


def _overlap(one: _Arc, other: _Arc) -> bool:
    lows, highs = zip(*(sorted((arc.source, arc.target)) for arc in (one, other)), strict=True)
    return bool(max(lows) < min(highs))


def _draw_neighbours(
    axes: Axes, graph: Graph, middle: float, centers: Sequence[float], heights: Sequence[float]
) -> None:
    """Draw the edges between levels next to each other, in the gap between their boxes."""
    for lower, (low, high) in enumerate(zip(graph.levels, graph.levels[1:], strict=False)):
        edges = [edge for edge in graph.edges if {edge.source, edge.target} == {low.name, high.name}]
        bottom, top = centers[lower] + heights[lower] / 2, centers[lower + 1] - heights[lower + 1] / 2
        for edge in edges:
            up = edge.source == low.name
            x = middle + (0.0 if len(edges) == 1 else 0.28 if up else -0.28)
            start, end = (bottom, top) if up else (top, bottom)
            points = [(x, start + (end - start) * step / 3) for step in range(4)]
            add_curve(axes, points, _color(edge, up=up), head=True, dashed=edge.detached)


def _color(edge: Edge, *, up: bool) -> str:
    return DETACHED if edge.detached else UP if up else DOWN


def _legend(graph: Graph) -> list[tuple[str, bool, str]]:
    """The colour, dash and meaning of each kind of edge that the graph has."""
    position = {level.name: index for index, level in enumerate(graph.levels)}
    attached = {position[edge.source] < position[edge.target] for edge in graph.edges if not edge.detached}
    keys = [(UP, False, "carries a best response up")] if True in attached else []
    keys += [(DOWN, False, "makes the lower level respond: nested")] if False in attached else []
    return keys + [(DETACHED, True, "detached: read by value only")] * any(edge.detached for edge in graph.edges)


def _draw_legend(axes: Axes, keys: Sequence[tuple[str, bool, str]], corner: tuple[float, float]) -> None:
    """Draw the legend, the first key on top, from its lower left corner."""
    x, y = corner
    for row, (color, dashed, text) in enumerate(reversed(keys)):
        height = y + (row + 0.5) * _KEY_HEIGHT
        add_curve(axes, [(x + 0.11 * step, height) for step in range(4)], color, head=True, dashed=dashed)
        write(axes, (x + _KEY, height), text, size=8.0, ha="left")


def _box_lines(graph: Graph, level: Problem) -> list[str]:
    """The text in a level's box: its name, then its particulars."""
    return [
        level.name,
        f"{type(level.module).__name__}, {_num_weights(level)}",
        f"{type(level.optimizer).__name__}, lr {_learning_rate(level)}, {_count(level.steps, 'step')}",
        *textwrap.wrap(_best_response(graph, level), 48),
    ]


def _size(row: int) -> float:
    return 8.5 if row else 11.0


def _weight(row: int) -> str:
    return "normal" if row else "bold"


def _write_lines(axes: Axes, lines: Sequence[str], center: tuple[float, float]) -> None:
    x, y = center
    y += (_HEADING_GAP + (len(lines) - 1) * _LINE_HEIGHT) / 2
    for row, line in enumerate(lines):
        color = MUTED if row else INK
        drop = row * _LINE_HEIGHT + _HEADING_GAP * (row > 0)
        write(axes, (x, y - drop), line, size=_size(row), weight=_weight(row), color=color)


def _best_response(graph: Graph, level: Problem) -> str:
    return "top level" if level is graph.levels[-1] else repr(level.hypergradient)


def _num_weights(level: Problem) -> str:
    count = sum(weight.numel() for weight in level.module.parameters() if weight.requires_grad)
    return f"{count:,} trainable weight{'s' * (count != 1)}"


def _learning_rate(level: Problem) -> str:
    """The learning rates of the optimizer's parameter groups, each once, in order."""
    return ", ".join(dict.fromkeys(f"{float(group['lr']):g}" for group in level.optimizer.param_groups))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
