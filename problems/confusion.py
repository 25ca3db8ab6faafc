"""Which classes a network takes for which: the confusion matrix as a picture and as a table.

An evaluation run writes both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlo.errors import MloError
from mlo.figures import FAINT, INK, MUTED, PAPER, house_style, save_figure, text_width, write
from mlo.files import write_text

Matrix = Sequence[Sequence[int]]
"""Row: true class, column: predicted class, entry: number of images."""

# Up to so many classes, each is named and each count is written.
_FEW = 20
# In inches.
_TILE = 0.42
_SIDE = 5.0
_MARGIN = 0.12
_AXIS_ROOM = 0.35
_TITLE_ROOM = 0.4
_BAR_ROOM = 1.1


def write_confusion(path: str | Path, matrix: Matrix, names: Sequence[str] | None = None) -> None:
    """Write a confusion matrix as CSV: a row a true class, a column a predicted one, both named.

    Args:
        path: of the file.
        matrix: counts, square.
        names: of the classes; by default their numbers.

    Raises:
        MloError: the matrix is not square, or not of so many classes.
    """
    names = _names(matrix, names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class", *names])
    writer.writerows([name, *row] for name, row in zip(names, matrix, strict=True))
    write_text(path, text.getvalue())


def draw_confusion(path: str | Path, matrix: Matrix, names: Sequence[str] | None = None) -> None:
    """Write a picture of a confusion matrix.

    Args:
        path: where to write; the suffix (`.png`, `.svg` or `.pdf`) is the format.
        matrix: as in `write_confusion`.
        names: as in `write_confusion`.

    Raises:
        MloError: as in `write_confusion`, or the suffix names another format.
    """
    save_figure(confusion_figure(matrix, names), path)


@house_style
def confusion_figure(matrix: Matrix, names: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix on a figure of the size that it needs: labelled tiles for few classes, else a map.

    Args:
        matrix: as in `write_confusion`.
        names: as in `write_confusion`.

    Returns:
        The figure; `draw_confusion` writes it.

    Raises:
        MloError: as in `write_confusion`.
    """
    names = _names(matrix, names)
    counts = np.array(matrix, dtype=float)
    totals = counts.sum(axis=1, keepdims=True)
    percent = 100.0 * np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    few = len(names) <= _FEW
    widest = max(text_width(name, 9.0) for name in names) if few else text_width("1000", 9.0)
    tile = max(_TILE, widest + 0.14) if few else 0.0
    side = tile * len(names) if few else _SIDE
    left, below = _MARGIN + _AXIS_ROOM + widest, _MARGIN + _AXIS_ROOM + 0.2
    width, height = left + side + _BAR_ROOM, below + side + _TITLE_ROOM + _MARGIN
    figure = Figure((width, height), facecolor=PAPER)

    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    # The root gives rare confusions a shade that can be seen beside a diagonal near 100 %.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0.0, 100.0), interpolation="nearest")
    axes.set_xlabel("predicted class", labelpad=5.0)
    axes.set_ylabel("true class", labelpad=5.0)
    if few:
        _label_tiles(figure, counts, percent, names)
    else:
        axes.spines[:].set_color(FAINT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_title("Confusion matrix", loc="left", pad=8.0, weight="bold")
    bar_axes = figure.add_axes(((left + side + 0.2) / width, below / height, 0.14 / width, side / height))
    ticks = [0, 10, 50, 100] if side < 2.5 else [0, 1, 5, 10, 25, 50, 100]
    bar = figure.colorbar(image, cax=bar_axes, format="%g%%", ticks=ticks, label="part of the true class")
    bar.outline.set_visible(False)
    bar_axes.tick_params(length=3.0)
    return figure


def _label_tiles(
    figure: Figure, counts: np.typing.NDArray[np.float64], percent: np.typing.NDArray[np.float64], names: Sequence[str]
) -> None:
    """Name the classes, part the tiles, and write each count but the zeros."""
    axes = figure.axes[0]
    axes.spines[:].set_visible(False)
    places = np.arange(len(names))
    axes.set_xticks(places, names, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xticks(places[1:] - 0.5, minor=True)
    axes.set_yticks(places[1:] - 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, lw=1.5)
    axes.tick_params(which="both", length=0)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = PAPER if percent[row, column] > 35.0 else INK
            bold = "bold" if row == column else "normal"
            write(axes, (column, row), f"{count:.0f}", size=7.5, weight=bold, color=color)
        else:
            write(axes, (column, row), "·", size=7.5, color=MUTED)


def _names(matrix: Matrix, names: Sequence[str] | None) -> list[str]:
    found = [str(index) for index in range(len(matrix))] if names is None else list(names)
    if not found or [len(row) for row in matrix] != [len(found)] * len(found):
        raise MloError(
            f"Expected a square confusion matrix of {len(found)} classes, at least one. Got rows of the lengths "
            f"{[len(row) for row in matrix][:10]}."
        )
    return found
