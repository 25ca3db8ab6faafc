"""Curves of the test error over the one number in which the groups of a recipe differ, as LBT's Figures 3 and 4.

Called by `mlo.comparison.report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mlo.comparison.columns import STANDARD, Column, Estimate
from mlo.comparison.found import is_number
from mlo.comparison.groups import Group, show_value
from mlo.figures import FAINT, MUTED, PAPER, house_style

_COLOR = "#1668b0"
_WIDE_RANGE = 50.0  # largest over smallest value, from which on the axis is logarithmic
_CLOSE = 0.09  # part of the axis that one label needs


@dataclass(frozen=True)
class Curve:
    """The means of a figure over a setting.

    Attributes:
        recipe: name of it.
        setting: dotted path of the setting.
        column: the figure.
        points: values of the setting, ascending, each with its estimate.
    """

    recipe: str
    setting: str
    column: Column
    points: tuple[tuple[float, Estimate], ...]


def find_curves(groups: Sequence[Group], column: Column = STANDARD[0]) -> list[Curve]:
    """Find the recipes whose groups differ in one setting, a number, with two values or more that have the figure."""
    curves = []
    for recipe in dict.fromkeys(group.recipe for group in groups):
        of_recipe = [group for group in groups if group.recipe == recipe]
        keys = {key for group in of_recipe for key in group.settings}
        if len(keys) != 1:
            continue
        (key,) = keys
        values = [(group.settings.get(key), column.estimate(group)) for group in of_recipe]
        if all(is_number(value) for value, _ in values):
            points = sorted((float(value), found) for value, found in values if value is not None and found is not None)
            if len(points) > 1:
                curves.append(Curve(recipe, key, column, tuple(points)))
    return curves


@house_style
def draw_curve(curve: Curve) -> Figure:
    """Draw the means as a line, with the sample standard deviation over seeds as bars."""
    figure = Figure((4.8, 3.2), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = figure.subplots()
    x = [value for value, _ in curve.points]
    means = [found.mean for _, found in curve.points]
    bars = [found.deviation or 0.0 for _, found in curve.points]
    axes.errorbar(
        x, means, yerr=bars, color=_COLOR, ecolor=MUTED, lw=1.5, elinewidth=1.0, capsize=3.0, marker="o", ms=4
    )
    places = x
    if min(x) > 0 and max(x) / min(x) >= _WIDE_RANGE:
        axes.set_xscale("log")
        places = [math.log(value) for value in x]
    gaps = [after - before for before, after in pairwise(places)]
    if min(gaps) >= _CLOSE * (places[-1] - places[0]):  # else matplotlib's own ticks, so that no two labels touch
        axes.set_xticks(x, [show_value(value) for value in x])
        axes.minorticks_off()
    axes.margins(x=0.06)
    axes.grid(axis="y", color=FAINT, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3.0)
    axes.set_xlabel(curve.setting, parse_math=False)
    axes.set_ylabel(curve.column.title, parse_math=False)
    counts = sorted({found.num_seeds for _, found in curve.points})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    plural = "s" * (counts[-1] > 1)
    spread = " ± standard deviation" if counts[-1] > 1 else ""
    axes.set_title(f"{curve.recipe}\nmean{spread} over {seeds} seed{plural}", loc="left", size=9.0, parse_math=False)
    return figure
