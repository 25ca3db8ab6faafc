"""What a benchmark is, what it gives, and how that is shown."""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import mlo
from mlo.figures import FAINT, PAPER, house_style

from ..accuracy import DISTRIBUTIONS, Notes, version
from .timing import Measured, Method, of

ROOT = Path(__file__).resolve().parents[3]
COLORS = ("#1668b0", "#c9480a", "#157a5a", "#7b4aa8", "#a97a10", "#b02a5b", "#4a5560", "#3d9bb3", "#8c564b", "#7f9a1f")


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        text: Markdown: tables and what they mean.
        raw: the numbers behind it, as JSON takes them.
        figures: pictures by name.
    """

    text: str
    raw: Any
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """One entry of `tests.benchmarks.speed.__main__.BENCHMARKS`.

    Attributes:
        name: on the command line and in file names.
        title: heading.
        run: `run(methods, quick)` measures those methods (all that are installed), in seconds if `quick`.
        methods: who takes part.
    """

    name: str
    title: str
    run: Callable[[Sequence[Method], bool], Result]
    methods: Sequence[Method]

    def installed(self) -> list[Method]:
        """The methods whose library is there."""
        return [m for m in self.methods if m.library not in DISTRIBUTIONS or version(m.library)]

    def missing(self) -> list[str]:
        """The libraries that are not."""
        return sorted({m.library for m in self.methods} - {m.library for m in self.installed()})


def agree(what: str, error: float, tolerance: float) -> None:
    """Stop where two methods do not compute the same thing: their times could then not be compared.

    Raises:
        AssertionError: the relative error is above the tolerance.
    """
    if not error <= tolerance:
        raise AssertionError(f"{what}: expected a relative difference of at most {tolerance:g}; found {error:.1e}")


def difference(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Return the Euclidean norm of the difference, relative to what is expected."""
    a, b = (torch.cat([t.detach().flatten().double() for t in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


def spread(values: Sequence[float], digits: str = ".3g") -> str:
    """Show a median and the range."""
    return f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def ratio_table(methods: Sequence[Method], found: Sequence[Measured], size: int, base: str, notes: Notes) -> list[str]:
    """One line a method: milliseconds for one unit of work, and the ratio to a base."""
    lines = [f"| | ms | x {base} |", "|---|---|---|"]
    reference = of(found, base, size)
    for method in methods:
        one = of(found, method.name, size)
        mark = f" {notes.mark(f'{method.name}: {method.note}')}" if method.note else ""
        if one.error:
            lines.append(f"| {method.name}{mark} | - {notes.mark(f'{method.name}: {one.error}')} | |")
        else:
            milliseconds = spread([1000 * s for s in one.seconds])
            ratio = spread(one.ratios(reference), ".2f") if not reference.error else ""
            lines.append(f"| {method.name}{mark} | {milliseconds} | {ratio} |")
    return lines


def size_table(
    methods: Sequence[Method],
    found: Sequence[Measured],
    heading: str,
    show: Callable[[Measured], str],
    notes: Notes,
) -> list[str]:
    """One line a size, one column a method."""
    titles = [f"{m.name} {notes.mark(f'{m.name}: {m.note}')}" if m.note else m.name for m in methods]
    lines = [f"| {heading} | {' | '.join(titles)} |", "|---" * (len(methods) + 1) + "|"]
    for size in dict.fromkeys(one.size for one in found):
        cells = []
        for method in methods:
            one = of(found, method.name, size)
            cells.append(f"- {notes.mark(f'{method.name}: {one.error}')}" if one.error else show(one))
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


@house_style
def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    *,
    logarithmic: tuple[bool, bool] = (False, False),
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Draw one line a method.

    Args:
        series: points of each, ascending in x.
        x: label of the axis.
        y: label of the axis.
        logarithmic: the axis of x, the axis of y; values of y that have no logarithm are left out.
        bands: lower and upper ends of what is shaded around the points.
    """
    figure = Figure((7.2, 3.8), facecolor=PAPER, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = figure.subplots()
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        if not points:
            continue
        places, values = zip(*points, strict=True)
        if logarithmic[1]:
            values = tuple(value if value > 0 else math.nan for value in values)
        few = len(points) < 20
        axes.plot(places, values, color=color, lw=1.5, marker="o" if few else "", ms=3.5, label=name)
        if bands is not None:
            axes.fill_between(places, *zip(*bands[name], strict=True), color=color, alpha=0.15, lw=0)
    for is_log, scale in zip(logarithmic, (axes.set_xscale, axes.set_yscale), strict=True):
        if is_log:
            scale("log", base=10)
    axes.grid(color=FAINT, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3.0)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y, parse_math=False)
    figure.legend(frameon=False, fontsize=8.0, loc="outside right upper")
    return figure


def raw(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return what was measured, for JSON."""
    return [asdict(one) for one in found]


def machine() -> dict[str, Any]:
    """Return the hardware, the versions and the commit."""
    cpu = platform.processor() or platform.machine()
    cores = None
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu, cores = (lines[0].partition(":")[2].strip(), len(lines)) if lines else (cpu, None)
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {
            "mlo": mlo.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            **{name: version(name) or "not installed" for name in DISTRIBUTIONS},
        },
        "commit": git.stdout.strip() or "unknown",
    }


def describe(found: Mapping[str, Any]) -> str:
    """Return the line of the report that says on what it was made."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    plural = "s" * (found["threads"] != 1)
    return (
        f"{found['cpu']}, {found['cores'] or 'unknown number of'} cores, {found['threads']} thread{plural}, "
        f"{found['system']}; {versions}; commit {found['commit']}."
    )
