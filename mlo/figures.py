"""The look of every picture, and the writing of it.

Pictures are made through matplotlib's object interface: no pyplot, so no global list of figures and no window system.
What decides the look and the bytes is fixed here, so that the same input gives the same file, whatever the user's own
matplotlib settings are. `mlo.drawing` and the pictures of the bundled problems are drawn on this.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as Curve
from matplotlib.textpath import text_to_path

from mlo.errors import MloError

INK = "#1d2733"
MUTED = "#66717e"
FAINT = "#c9d0d8"
PAPER = "#ffffff"

_MIME = {".svg": "image/svg+xml", ".png": "image/png"}

# Of an arrow, in inches.
_HEAD_LENGTH = 0.1
_HEAD_WIDTH = 0.095

# Not a `dict[str, Any]`: the keys that `rc_context` declares differ between releases of matplotlib.
_STYLE: Any = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9.0,
    "text.color": INK,
    "text.usetex": False,
    "mathtext.fontset": "dejavusans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.0,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "path.simplify": True,
    "savefig.bbox": None,
    "savefig.transparent": False,
    "pdf.fonttype": 42,
    # Labels stay text: they can be searched and copied. The fall-back fonts are no wider than the one measured.
    "svg.fonttype": "none",
    "svg.hashsalt": "mlo",
}

house_style = mpl.rc_context(_STYLE)
"""Decorator: the settings under which a function builds or writes a figure."""

# What would make two files of the same picture differ: dates, and the version of the library that wrote them.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def data_url(path: Path) -> str:
    """Return a picture, `.png` or `.svg`, as a data URL: an image, in which nothing can run or clash with a page."""
    return f"data:{_MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


@house_style
def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, reproducibly, in the format that the suffix names.

    Args:
        figure: The figure, with any canvas.
        path: Where to write; the suffix is `.png`, `.svg` or `.pdf`. An existing file is replaced.

    Returns:
        The path written.

    Raises:
        MloError: If the suffix names another format.
    """
    path = Path(path)
    if path.suffix not in _METADATA:
        raise MloError(f"Expected a picture's name to end in one of {', '.join(_METADATA)}. Got {str(path)!r}.")
    figure.savefig(path, format=path.suffix[1:], dpi=200, metadata=_METADATA[path.suffix])
    return path


def inch_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure whose only axes fill it and are measured in inches, the origin at the lower left.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        The figure and its axes, without frame or ticks.
    """
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0.0, width)
    axes.set_ylim(0.0, height)
    return figure, axes


@house_style
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Measure one line of text.

    Args:
        text: The line, not read as mathematics.
        size: Font size in points.
        weight: `"normal"` or `"bold"`.

    Returns:
        Its width in inches.
    """
    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72.0


def write(
    axes: Axes,
    place: tuple[float, float],
    text: str,
    *,
    size: float,
    weight: str = "normal",
    color: str = INK,
    ha: Literal["left", "center", "right"] = "center",
) -> None:
    """Write one line of text as it stands, a dollar sign included, on axes measured in inches.

    Args:
        axes: Axes from `inch_figure`.
        place: The middle of the line's height and, of its width, what `ha` says; in inches.
        text: The line.
        size: Font size in points.
        weight: `"normal"` or `"bold"`.
        color: Of the letters.
        ha: The part of the line that lies at `place`.
    """
    axes.text(
        *place, text, size=size, weight=weight, color=color, ha=ha, va="center_baseline", parse_math=False, zorder=5
    )


def add_box(axes: Axes, center: tuple[float, float], size: tuple[float, float], *, fill: str, line: str) -> None:
    """Draw a rounded box on axes measured in inches.

    Args:
        axes: Axes from `inch_figure`.
        center: In inches.
        size: Width and height in inches.
        fill: Colour of the inside.
        line: Colour of the border.
    """
    (x, y), (width, height) = center, size
    rounding = f"round,pad=0,rounding_size={min(0.09, height / 2, width / 2)}"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=rounding, fc=fill, ec=line, lw=1.1, zorder=3))


def add_curve(
    axes: Axes, points: Sequence[tuple[float, float]], color: str, *, head: bool, dashed: bool = False
) -> None:
    """Draw a curve made of cubic pieces, perhaps with an arrow head at its end.

    Args:
        axes: Axes from `inch_figure`.
        points: The start, then three points (two controls and an end) for each piece, in inches.
        color: Of the line and its head.
        head: Whether the curve ends in an arrow head; its tip is then the last point.
        dashed: Whether the line is dashed (the head never is).
    """
    vertices = np.array(points, dtype=float)
    if head:
        tip = vertices[-1].copy()
        along = tip - vertices[-2]
        along *= _HEAD_LENGTH / np.hypot(*along)
        across = _HEAD_WIDTH / _HEAD_LENGTH / 2 * np.array([-along[1], along[0]])
        base = tip - along
        axes.add_patch(Polygon([tip, base + across, base - across], closed=True, fc=color, ec="none", zorder=4))
        # The line stops inside the head, whose tip would otherwise look blunt.
        vertices[-2:] -= 0.8 * along
    codes = [Curve.MOVETO, *[Curve.CURVE4] * (len(vertices) - 1)]
    line = PathPatch(Curve(vertices, codes), fc="none", ec=color, lw=1.4, capstyle="butt", zorder=2)
    if dashed:
        line.set_linestyle((0.0, (3.5, 2.0)))
    axes.add_patch(line)
