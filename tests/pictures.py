"""Checks that the tests of all pictures share. Coordinates are in inches, from the lower left of the figure."""

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def text_boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, and where."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    # Ticks beyond the ends of an axis have labels too, which are not drawn.
    beyond = [
        tick.label1
        for axes in figure.axes
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high
    ]
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]
    to_inches = figure.dpi_scale_trans.inverted()
    return [(text.get_text(), text.get_window_extent(renderer).transformed(to_inches)) for text in texts]


def overlapping(boxes: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    """The pairs that have a common point inside both."""
    return [
        (one, other)
        for (one, box), (other, around) in itertools.combinations(boxes, 2)
        if min(box.x1, around.x1) - max(box.x0, around.x0) > 1e-6 < min(box.y1, around.y1) - max(box.y0, around.y0)
    ]


def outside(figure: Figure, boxes: list[tuple[str, Bbox]]) -> list[str]:
    """The texts that leave the figure."""
    width, height = figure.get_size_inches()
    return [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width + 1e-6 or box.y1 > height + 1e-6]


def rounded_boxes(figure: Figure) -> list[Bbox]:
    """The boxes that `mlo.figures.add_box` has drawn, in order."""
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    return [_inches(figure, box).get_extents() for box in boxes]


def curves(figure: Figure) -> list[np.ndarray]:
    """Points, at most 0.01 apart, on the lines that `mlo.figures.add_curve` has drawn, in order: arrays (n, 2)."""
    found = []
    for patch in figure.axes[0].patches:
        if isinstance(patch, PathPatch):
            corners = np.concatenate(_inches(figure, patch).to_polygons(closed_only=False))
            lengths = np.hypot(*np.diff(corners, axis=0).T)
            steps = [np.linspace(0.0, 1.0, int(length / 0.01) + 2)[:, None] for length in lengths]
            pieces = zip(corners, corners[1:], steps, strict=False)
            found.append(np.concatenate([start + (end - start) * step for start, end, step in pieces]))
    return found


def is_crossed(box: Bbox, points: np.ndarray, margin: float = 0.02) -> bool:
    """Whether some point lies inside a box, farther than `margin` from its sides."""
    low, high = box.min + margin, box.max - margin
    return bool(((points > low) & (points < high)).all(axis=1).any())


def svg_texts(path: Path) -> list[str]:
    """The texts of an SVG file, which must be well-formed."""
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def assert_is_drawn(path: Path) -> None:
    """Check that a PNG has a sane size and that something is on it."""
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert 200 <= width <= 4000
    assert 100 <= height <= 4000
    ink = (image[..., :3] < 0.9).any(axis=2).mean()
    assert 0.005 < ink < 0.6


def _inches(figure: Figure, patch: FancyBboxPatch | PathPatch):
    return (
        patch.get_path()
        .transformed(patch.get_patch_transform() + figure.axes[0].transData)
        .transformed(figure.dpi_scale_trans.inverted())
    )
