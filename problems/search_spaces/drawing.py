"""Pictures of cells: a discrete one as a graph, and relaxed ones as heat maps of their weights.

Nodes are numbered as in a genotype: 0 and 1 are the inputs, the outputs of the two cells before. A run draws the cells
that it found, and the weights that it took them from.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from mlo.errors import MloError
from mlo.figures import INK, MUTED, PAPER, add_box, add_curve, house_style, inch_figure, save_figure, text_width, write
from problems.search_spaces.cell_layout import Item, Layout, lay_out

# The families of primitives by prefix, each with the colour of its lines and that of its boxes.
FAMILIES = {
    "skip": ("#5c6773", "#eef0f3"),
    "avg_pool": ("#157a5a", "#e3f4ed"),
    "max_pool": ("#157a5a", "#e3f4ed"),
    "sep_conv": ("#1668b0", "#e5f0fa"),
    "dil_conv": ("#b9560a", "#fcefe2"),
}
OTHER_FAMILY = ("#7b4aa8", "#f2eaf8")

Weights = npt.NDArray[np.floating[Any]]

# In inches and points.
_MARGIN = 0.2
_TITLE_HEIGHT = 0.36
_LABEL_SIZE = 8.5
_OPERATION_HEIGHT = 0.25
_TERMINAL = (0.58, 0.4)
_NODE = (0.4, 0.4)
_TILE = (0.52, 0.36)
_HEADROOM = 0.75
_BAR_ROOM = 1.1
_NOTE_HEIGHT = 0.17


def draw_cell(edges: Sequence[tuple[str, int]], concat: Sequence[int], path: str | Path, title: str) -> None:
    """Write a picture of a discrete cell.

    Args:
        edges: (primitive, source node) of each edge, two for each intermediate node in turn, as in a `Genotype`.
        concat: The nodes that feed the output.
        path: Where to write; the suffix (`.png`, `.svg` or `.pdf`) is the format.
        title: Stands above the cell.

    Raises:
        MloError: If the suffix names another format.
    """
    save_figure(cell_figure(edges, concat, title), path)


@house_style
def cell_figure(edges: Sequence[tuple[str, int]], concat: Sequence[int], title: str) -> Figure:
    """Draw a discrete cell on a figure of the size that it needs.

    Args:
        edges: As in `draw_cell`.
        concat: As in `draw_cell`.
        title: As in `draw_cell`.

    Returns:
        The figure; `draw_cell` writes it.
    """
    width = max(text_width(primitive, _LABEL_SIZE) for primitive, _ in edges) + 0.2
    layout = lay_out(
        [source for _, source in edges], concat, terminal=_TERMINAL, node=_NODE, operation=(width, _OPERATION_HEIGHT)
    )
    left, right = layout.sides[0][0], layout.sides[-1][1]
    figure, axes = inch_figure(
        max(right - left, text_width(title, 11.0, "bold")) + 2 * _MARGIN, layout.height + _TITLE_HEIGHT + 2 * _MARGIN
    )
    # The layout has its origin at the upper left, below the title, and y growing downwards.
    axes.set_xlim(left - _MARGIN, left - _MARGIN + figure.get_figwidth())
    axes.set_ylim(layout.height + _MARGIN, -_TITLE_HEIGHT - _MARGIN)
    write(axes, (left, -_TITLE_HEIGHT + 0.08), title, size=11.0, weight="bold", ha="left")
    for (primitive, _), line in zip(edges, layout.lines, strict=False):
        _draw_line(axes, layout, line, _family(primitive)[0])
    for line in layout.lines[len(edges) :]:
        _draw_line(axes, layout, line, MUTED)
    for item in itertools.chain.from_iterable(layout.columns):
        if item.kind == "operation":
            primitive = edges[item.index][0]
            line_color, fill = _family(primitive)
            add_box(axes, (item.x, item.y), (item.width, item.height), fill=fill, line=line_color)
            write(axes, (item.x, item.y), primitive, size=_LABEL_SIZE, color=line_color)
        elif item.kind != "bend":
            _draw_node(axes, item)
    return figure


def _family(primitive: str) -> tuple[str, str]:
    return next((colors for prefix, colors in FAMILIES.items() if primitive.startswith(prefix)), OTHER_FAMILY)


def _draw_node(axes: Axes, item: Item) -> None:
    fill = PAPER if item.kind == "node" else "#e9ecf0"
    add_box(axes, (item.x, item.y), (item.width, item.height), fill=fill, line=INK)
    label = {"input": ("$c_{k-2}$", "$c_{k-1}$")[item.index % 2], "output": "$c_k$"}.get(item.kind, str(item.index))
    axes.text(item.x, item.y, label, size=10.0, ha="center", va="center_baseline", zorder=5)


def _draw_line(axes: Axes, layout: Layout, line: Sequence[Item], color: str) -> None:
    """Draw a line through its items: level across each column, in an S between two; boxes lie on top of it."""
    first = next(index for index, column in enumerate(layout.columns) if line[0] in column)
    x, y = line[0].x + line[0].width / 2, line[0].exit(line[1])
    points = [(x, y)]
    for (source, target), (_, start), (end, _) in zip(
        itertools.pairwise(line), layout.sides[first:], layout.sides[first + 1 :], strict=False
    ):
        leave, arrive = source.exit(target), target.entry(source)
        middle = (start + end) / 2
        points += _level(points[-1], start)
        points += [(middle, leave), (middle, arrive), (end, arrive)]
    points += _level(points[-1], line[-1].x - line[-1].width / 2)
    add_curve(axes, points, color, head=True)


def _level(start: tuple[float, float], x: float) -> list[tuple[float, float]]:
    """The cubic piece from `start` straight across to `x`; none where there is no way to go."""
    if np.isclose(start[0], x):
        return []
    return [(start[0] + (x - start[0]) * step / 3, start[1]) for step in (1, 2, 3)]


def draw_alphas(
    path: str | Path,
    probabilities: Mapping[str, Weights],
    primitives: Sequence[str],
    initial: Mapping[str, Weights] | None = None,
) -> None:
    """Write heat maps of the weights that relaxed cells give to their primitives.

    Args:
        path: Where to write; the suffix (`.png`, `.svg` or `.pdf`) is the format.
        probabilities: For each cell, by name, its weights in [0, 1], of shape (edges, primitives); edges node by node,
            and for each node one edge from every node before it. NaN where an edge has no such primitive.
        primitives: The names of the primitives.
        initial: The same before the search; if given, the changes since are written below the weights.

    Raises:
        MloError: If the weights of a cell have another shape, or the suffix names another format.
    """
    save_figure(alphas_figure(probabilities, primitives, initial), path)


@house_style
def alphas_figure(
    probabilities: Mapping[str, Weights], primitives: Sequence[str], initial: Mapping[str, Weights] | None = None
) -> Figure:
    """Draw heat maps on a figure of the size that they need.

    Args:
        probabilities: As in `draw_alphas`.
        primitives: As in `draw_alphas`.
        initial: As in `draw_alphas`.

    Returns:
        The figure; `draw_alphas` writes it.

    Raises:
        MloError: If the weights of a cell have another shape.
    """
    labels = {name: _edge_labels(name, weights.shape, len(primitives)) for name, weights in probabilities.items()}
    percent = {name: 100.0 * np.asarray(weights, dtype=float) for name, weights in probabilities.items()}
    # The scale spans the weights that there are, so that a search that has hardly moved shows what moved.
    lowest = min(float(np.nanmin(weights)) for weights in percent.values())
    highest = max(float(np.nanmax(weights)) for weights in percent.values())
    scale = (lowest, max(highest, lowest + 0.1))

    note = "Weight of each primitive after the softmax, in percent; the largest of each edge in bold."
    note += " Below it, its change, in points." * (initial is not None)
    left = _MARGIN + 0.1 + max(text_width(primitive, 9.0) for primitive in primitives)
    grid_width, grid_height = _TILE[0] * max(map(len, percent.values())), _TILE[1] * len(primitives)
    width = left + grid_width + _BAR_ROOM
    lines = textwrap.wrap(note, int(14.5 * (width - 2 * _MARGIN)))
    foot = _MARGIN + _NOTE_HEIGHT * len(lines)
    height = (grid_height + _HEADROOM) * len(percent) + foot
    figure, page = inch_figure(width, height)
    for row, line in enumerate(reversed(lines)):
        write(page, (_MARGIN, _MARGIN + _NOTE_HEIGHT * (row + 0.5)), line, size=8.0, color=MUTED, ha="left")

    def panel(x: float, y: float, size: tuple[float, float]) -> Axes:
        return figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))

    for row, (name, weights) in enumerate(percent.items()):
        bottom = height - (row + 1) * (grid_height + _HEADROOM) + 0.25
        axes = panel(left, bottom, (_TILE[0] * len(weights), grid_height))
        change = None if initial is None else weights - 100.0 * np.asarray(initial[name], dtype=float)
        mesh = _draw_heat_map(axes, weights, change, scale)
        axes.set_title(f"{name} cell", loc="left", pad=8.0, weight="bold", size=11.0, parse_math=False)
        axes.set_xticks(np.arange(len(weights)) + 0.5, labels[name])
        axes.set_yticks(np.arange(len(primitives)) + 0.5, primitives, parse_math=False)
    bar_axes = panel(left + grid_width + 0.25, bottom, (0.14, height - _HEADROOM + 0.25 - bottom))
    bar = figure.colorbar(mesh, cax=bar_axes, format="%g%%")
    bar.outline.set_visible(False)
    return figure


def _edge_labels(name: str, shape: tuple[int, ...], num_primitives: int) -> list[str]:
    """Label a cell's edges "source→target", in their order: node by node."""
    labels: list[str] = []
    for node in itertools.count(2):
        if len(labels) >= shape[0]:
            break
        labels += [f"{source}→{node}" for source in range(node)]
    if shape != (len(labels), num_primitives):
        raise MloError(
            f"Expected the weights of cell {name!r} to have shape (2 + 3 + ... edges, {num_primitives} primitives). "
            f"Got {shape}."
        )
    return labels


def _draw_heat_map(axes: Axes, weights: Weights, change: Weights | None, scale: tuple[float, float]) -> QuadMesh:
    """Draw one cell's weights in percent, the largest of each edge in bold, with their changes below them."""
    num_edges, num_primitives = weights.shape
    lowest, highest = scale
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(weights.T), cmap="Blues", vmin=lowest, vmax=highest, edgecolors=PAPER, linewidth=1.5
    )
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    # A wider gap before the edges of each node.
    starts = [start for start in itertools.accumulate(range(2, num_edges)) if start < num_edges]
    axes.vlines(starts, 0, num_primitives, color=PAPER, lw=6.0)
    for (edge, primitive), weight in np.ndenumerate(weights):
        if np.isnan(weight):
            continue
        color = PAPER if weight > lowest + 0.55 * (highest - lowest) else INK
        bold = "bold" if weight == np.nanmax(weights[edge]) else "normal"
        x, y = edge + 0.5, primitive + 0.5
        if change is not None:
            points = f"{np.round(change[edge, primitive], 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")
            write(axes, (x, y + 0.22), points, size=6.0, color=color)
            y -= 0.16
        write(axes, (x, y), f"{weight:.1f}", size=7.5, weight=bold, color=color)
    return mesh
