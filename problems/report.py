"""What a run looks like: its learning curves, and a report on one page.

`write_report` gathers what a finished run left in its folder into a single HTML file that needs nothing else: no
network, no script, no other file. A run calls it at its end, and `mlo resume` on a finished run again; the run itself
has drawn the curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mlo.errors import MloError
from mlo.figures import FAINT, PAPER, data_url, house_style, save_figure, text_width
from mlo.files import write_text
from problems.search_spaces.genotypes import Genotype

PICTURES = ("cell_normal.svg", "cell_reduce.svg", "curves.png")
"""The pictures of every run, in its folder."""

SOME_PICTURES = ("alphas.png", "graph.svg", "confusion.svg")
"""Those of some: of a search the first two, of an evaluation the last."""

_TEXTS = ("recipe.yaml", "result.json", "genotype.json", "metrics.jsonl")
_NUMBERS = ("test_error", "num_parameters", "evaluation_seconds")
_SOME_NUMBERS = (
    "random_cell_test_error",
    "test_error_top5",
    "random_cell_test_error_top5",
    "multiply_adds",
    "alpha_change",
    "search_seconds",
)
_RESULTS = (*_NUMBERS, "seed", "recipe", "versions")
_KINDS = ("loss", "accuracy")
_COLORS = ("#1668b0", "#c9480a", "#157a5a", "#7b4aa8", "#a97a10", "#b02a5b", "#4a5560")
# Longer series than this are drawn pale, under a running mean over one part in _NUM_PARTS of them.
_SHORT = 120
_NUM_PARTS = 40


def draw_curves(path: str | Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write the learning curves of a run: a column of panels for each phase, a row for losses, one for accuracies, ...

    Args:
        path: Where to write; the suffix (`.png`, `.svg` or `.pdf`) is the format.
        metrics: The lines of `metrics.jsonl`. Numbers under the keys "LEVEL.METRIC" are drawn over "round", in a panel
            of the line's "phase"; learning rates and timings are not, nor values that are not finite.

    Raises:
        MloError: If the suffix names another format, or there is nothing to draw.
    """
    save_figure(curves_figure(metrics), path)


@house_style
def curves_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the learning curves of a run.

    Args:
        metrics: As in `draw_curves`.

    Returns:
        The figure; `draw_curves` writes it.

    Raises:
        MloError: If there is nothing to draw.
    """
    series = _series(metrics)
    if not series:
        raise MloError('Expected a metric of a level, such as "teacher.loss", in some line. Got none.')
    phases = list(dict.fromkeys(phase for phase, _, _ in series))
    kinds = sorted(dict.fromkeys(kind for _, kind, _ in series), key=lambda kind: kind not in _KINDS)
    names = list(dict.fromkeys(name for _, _, name in series))
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
    width = max(3.2 * len(phases), 4.8) + 0.4
    pads = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure((width, 2.3 * len(kinds) + 1.0), facecolor=PAPER, layout=pads)
    panels = figure.subplots(len(kinds), len(phases), squeeze=False, sharey="row", sharex="col")
    for (row, column), axes in np.ndenumerate(panels):
        axes.grid(axis="y", color=FAINT, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3.0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        for (phase, kind, name), points in series.items():
            if (phase, kind) == (phases[column], kinds[row]):
                _draw_series(axes, points, colors[name])
    for phase, axes in zip(phases, panels[0], strict=True):
        axes.set_title(phase.replace("_", " "), loc="left", weight="bold", parse_math=False)
    for kind, axes in zip(kinds, panels[:, 0], strict=True):
        axes.set_ylabel(kind.replace("_", " ") + " (%)" * (kind == "accuracy"), parse_math=False)
    figure.align_ylabels()
    smoothed = any(len(points) > _SHORT for points in series.values())
    note = f" (pale: as measured; solid: running mean over 1/{_NUM_PARTS} of the phase)" * smoothed
    figure.supxlabel("round" + note, size=9.0)
    handles = [Line2D([], [], color=color, lw=2.0) for color in colors.values()]
    widths = [text_width(name, 9.0) + 0.6 for name in names]
    ncols = len(names) if sum(widths) < width else max(1, int(width / max(widths)))
    legend = figure.legend(handles, names, loc="outside upper left", ncols=ncols, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _series(metrics: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """The (round, value) points of each (phase, kind, name) that is drawn."""
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for line in metrics:
        for key, value in line.items():
            level, _, metric = key.partition(".")
            if not metric or metric.endswith(("learning_rate", "_seconds")) or not _is_finite(value):
                continue
            # "architecture.teacher_accuracy" is drawn among the accuracies, as "architecture: teacher".
            kind = next((kind for kind in _KINDS if metric.endswith(kind)), metric)
            part = metric.removesuffix(kind).strip("_").replace("_", " ")
            points = series.setdefault((line["phase"], kind, f"{level}: {part}" if part else level), [])
            points.append((line["round"], 100.0 * value if kind == "accuracy" else value))
    return series


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _draw_series(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    rounds, values = np.array(points, dtype=float).T
    if len(points) <= _SHORT:
        axes.plot(rounds, values, color=color, lw=1.5, marker="o", ms=2.5)
        return
    axes.plot(rounds, values, color=color, lw=0.6, alpha=0.3, zorder=1.5)
    window = np.ones(len(points) // _NUM_PARTS)
    # At both ends the mean is over what there is.
    counts = np.convolve(np.ones(len(points)), window, mode="same")
    axes.plot(rounds, np.convolve(values, window, mode="same") / counts, color=color, lw=1.5)


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder of a finished run.

    Args:
        folder: Holds what a run leaves: `recipe.yaml`, `result.json`, `genotype.json`, `metrics.jsonl`, `PICTURES`, and
            perhaps `SOME_PICTURES`.

    Returns:
        The path of the report. An older one is replaced.

    Raises:
        MloError: If a file is missing or does not hold what it should.
    """
    folder = Path(folder)
    missing = [name for name in (*_TEXTS, *PICTURES) if not (folder / name).is_file()]
    if missing:
        raise MloError(f"Expected a finished run in {folder}. Missing there: {', '.join(missing)}.")
    result = _load(folder / "result.json", _RESULTS)
    for key in (*_NUMBERS, *(key for key in _SOME_NUMBERS if key in result)):
        if not _is_finite(result[key]):
            raise MloError(f"{folder / 'result.json'}: expected {key!r} to be a finite number. Got {result[key]!r}.")
    genotype = _load(folder / "genotype.json", [field.name for field in fields(Genotype)])
    try:
        checked = Genotype.from_json(genotype)
    except ValueError as error:
        raise MloError(f"{folder / 'genotype.json'}: {error}") from error
    metrics = folder / "metrics.jsonl"
    lines = [
        _parse(line, f"{metrics}, line {number}", ("phase", "round"))
        for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    loader = ChoiceLoader([PackageLoader("problems"), PackageLoader("mlo")])  # mlo's has the style sheet of all pages
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"duration": _duration, "metric": _format_metric}
    page = environment.get_template("report.html.j2").render(
        result=result,
        others={key: value for key, value in result.items() if key not in (*_RESULTS, *_SOME_NUMBERS)},
        pictures={
            Path(name).stem: data_url(folder / name)
            for name in (*PICTURES, *SOME_PICTURES)
            if (folder / name).is_file()
        },
        cells=[
            ("normal", list(zip(checked.normal[::2], checked.normal[1::2], strict=True)), checked.normal_concat),
            ("reduction", list(zip(checked.reduce[::2], checked.reduce[1::2], strict=True)), checked.reduce_concat),
        ],
        genotype=json.dumps(genotype),
        last=_last_metrics(lines),
        recipe=(folder / "recipe.yaml").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _load(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    return _parse(path.read_text(encoding="utf-8"), str(path), keys)


def _parse(text: str, where: str, keys: Iterable[str]) -> dict[str, Any]:
    """Parse an object of JSON that has at least the given keys."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise MloError(f"{where}: expected JSON. Got {text[:40]!r}: {error}.") from error
    absent = [key for key in keys if key not in data] if isinstance(data, dict) else list(keys)
    if absent:
        raise MloError(f"{where}: expected an object with the keys {', '.join(keys)}. Missing: {', '.join(absent)}.")
    return dict(data)


def _last_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last value of every metric, by phase."""
    last: dict[str, dict[str, Any]] = {}
    for line in lines:
        last.setdefault(line["phase"], {}).update({key: value for key, value in line.items() if key != "phase"})
    return last


def _format_metric(value: object, key: str) -> str:
    """A metric for the eye: accuracies, which are fractions, in percent; timings in units of time."""
    if not isinstance(value, (int, float)) or isinstance(value, int):
        return str(value)
    if key.endswith("accuracy"):
        return f"{100.0 * value:.2f} %"
    return _duration(value) if key.endswith("_seconds") else f"{value:.4g}"


def _duration(seconds: float) -> str:
    """A time in the two largest units that it has."""
    if seconds < 60.0:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60.0)
    if seconds < 3600.0:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
