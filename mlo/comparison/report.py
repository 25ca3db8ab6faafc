"""`mlo report`: everything that it writes into its folder.

Called by `mlo.cli`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mlo.comparison.columns import choose_columns
from mlo.comparison.curves import Curve, draw_curve, find_curves
from mlo.comparison.found import FoundRun
from mlo.comparison.groups import group_runs
from mlo.comparison.references import Reference
from mlo.comparison.tables import Table, make_table, to_csv, to_latex, to_markdown
from mlo.figures import data_url, save_figure
from mlo.files import write_text
from mlo.version import __version__


def write_comparison(
    runs: Sequence[FoundRun],
    folder: Path,
    *,
    group_by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    references: Mapping[str, Sequence[Reference]],
) -> tuple[str, list[Path]]:
    """Compare runs: `table.md`, `table.tex`, `table.csv`, `comparison.html`, and a picture of each curve.

    Args:
        runs: finished or not.
        folder: to write into; made if it is not there. Older files of the same names are replaced.
        group_by: see `group_runs`.
        metrics: figures to show beside the standard ones.
        references: published rows by the name of the recipe.

    Returns:
        The table as Markdown, and the files written.

    Raises:
        MloError: a setting or a figure is not there, or is no number; nothing is written then.
    """
    groups = group_runs(runs, group_by)
    columns = choose_columns(groups, metrics)
    table = make_table(groups, columns, references)
    texts = {
        "table.md": to_markdown(table),
        "table.tex": to_latex(table),
        "table.csv": to_csv(groups, columns, references),
    }
    curves = find_curves(groups)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    pictures = []
    for curve in curves:
        stem = re.sub(r"[^\w.-]+", "-", f"{curve.recipe}-{curve.setting}")
        figure = draw_curve(curve)
        written += [save_figure(figure, folder / f"{stem}.{suffix}") for suffix in ("png", "svg")]
        pictures.append((curve, written[-1]))
    texts["comparison.html"] = _page(table, pictures)
    for name, text in texts.items():
        write_text(folder / name, text)
        written.append(folder / name)
    return texts["table.md"], written


def _page(table: Table, pictures: Sequence[tuple[Curve, Path]]) -> str:
    environment = Environment(loader=PackageLoader("mlo"), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("comparison.html.j2").render(
        table=table, pictures=[(curve, data_url(path)) for curve, path in pictures], version=__version__
    )
