"""The table of a comparison, and its four forms: Markdown, LaTeX, CSV, and what the page is made of.

Called by `mlo.comparison.report`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlo.comparison.columns import Column
from mlo.comparison.groups import Group, show_value
from mlo.comparison.references import Reference
from mlo.comparison.significance import compare_with_random

_NONE = "—"


@dataclass(frozen=True)
class Table:
    """A table as texts, the same in every form.

    Attributes:
        header: of the columns.
        rows: as many cells each.
        num_texts: columns at the left that are text; the others are numbers.
        sources: what the numbers in brackets in the last column stand for, from 1 on.
        comparisons: with random cells, a sentence each.
        notes: about the table.
        unfinished: runs that are not in the numbers, a line each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_texts: int
    sources: tuple[str, ...]
    comparisons: tuple[str, ...]
    notes: tuple[str, ...]
    unfinished: tuple[str, ...]


def make_table(
    groups: Sequence[Group], columns: Sequence[Column], references: Mapping[str, Sequence[Reference]]
) -> Table:
    """Make the table of some groups, one a row.

    Args:
        groups: of runs.
        columns: to show.
        references: published rows by the name of the recipe.
    """
    has_labels = any(group.settings for group in groups)
    has_unfinished = any(group.unfinished for group in groups)
    rows, sources = [], dict[str, int]()
    for group in groups:
        cells = [group.recipe, *([group.label or _NONE] if has_labels else []), str(group.num_seeds)]
        cells += [str(len(group.unfinished) or _NONE)] if has_unfinished else []
        cells += [column.show(column.estimate(group)) for column in columns]
        published = [
            f"{row.error} [{sources.setdefault(row.sentence, len(sources) + 1)}]"
            for row in references.get(group.recipe, ())
        ]
        rows.append((*cells, "; ".join(published) or _NONE))
    header = ["recipe", *(["settings"] if has_labels else []), "seeds", *(["unfinished"] if has_unfinished else [])]
    return Table(
        header=(*header, *(column.title for column in columns), "published"),
        rows=tuple(rows),
        num_texts=1 + has_labels,
        sources=tuple(sources),
        comparisons=tuple(sentence for group in groups if (sentence := compare_with_random(group))),
        notes=tuple(_notes(groups, columns, bool(sources))),
        unfinished=tuple(f"{run.folder} ({run.state})" for group in groups for run in group.unfinished),
    )


def _notes(groups: Sequence[Group], columns: Sequence[Column], has_sources: bool) -> list[str]:
    notes = []
    if any(group.num_seeds > 1 for group in groups):
        notes.append("± is the sample standard deviation over seeds.")
    if has_sources:
        notes.append("Published figures are for the recipe as it is bundled, in percent of test error.")
    for group in groups:
        title = " ".join(text for text in (group.recipe, group.label) if text)
        if len(group.finished) > group.num_seeds:
            notes.append(
                f"{title}: {len(group.finished)} finished runs of {group.num_seeds} seed"
                f"{'s' * (group.num_seeds > 1)}; the runs of a seed count as their mean."
            )
        for column in columns:
            estimate = column.estimate(group)
            if estimate is not None and estimate.num_seeds < group.num_seeds:
                notes.append(f"{title}: only {estimate.num_seeds} of {group.num_seeds} seeds have {column.key}.")
    return notes


def to_markdown(table: Table) -> str:
    """Write the table as Markdown that is aligned, so that it reads well as it stands."""
    lines = [tuple(cell.replace("|", "\\|") for cell in row) for row in (table.header, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "| " + " | ".join(_pad(cell, width, i < table.num_texts) for i, (cell, width) in enumerate(cells)) + " |"
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = [("-" * width if i < table.num_texts else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    texts.insert(1, "| " + " | ".join(rule) + " |")
    for title, items in (
        ("", [f"[{number}] {source}" for number, source in enumerate(table.sources, start=1)]),
        ("", table.notes),
        ("Found and random cells, paired over seeds:", table.comparisons),
        ("Unfinished, and not in the figures:", table.unfinished),
    ):
        if items:
            texts += ["", *([title, ""] if title else []), *(f"- {item}" for item in items)]
    return "\n".join(texts) + "\n"


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def to_latex(table: Table) -> str:
    """Write the table for LaTeX with the package booktabs; what stands below it is in comments and a footnote."""
    alignment = "l" * table.num_texts + "r" * (len(table.header) - table.num_texts)
    lines = [
        "% Needs \\usepackage{booktabs}.",
        *(f"% unfinished: {line}" for line in table.unfinished),
        f"\\begin{{tabular}}{{{alignment}}}",
        "\\toprule",
        " & ".join(map(_latex, table.header)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(_latex, row)) + " \\\\" for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    below = [f"[{number}] {source}." for number, source in enumerate(table.sources, start=1)]
    below += [*table.notes, *(f"{sentence}." for sentence in table.comparisons)]
    if below:
        lines += ["", "\\medskip", "{\\footnotesize", *(f"{_latex(line)}\\par" for line in below), "}"]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "—": "---", "<": r"\textless{}",
    ">": r"\textgreater{}", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _latex(text: str) -> str:
    return re.sub(r"[\\{}$&#_%~^±—<>\[\]]", lambda found: _LATEX[found[0]], text)


def to_csv(groups: Sequence[Group], columns: Sequence[Column], references: Mapping[str, Sequence[Reference]]) -> str:
    """Write the numbers unrounded, for programs: in the units of the other forms, a column for each setting."""
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    header = ["recipe", *keys, "seeds", "unfinished"]
    header += [f"{column.title} {part}" for column in columns for part in ("mean", "deviation")]
    header += ["published mean", "published deviation", "published source"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for group in groups:
        row: list[object] = [group.recipe]
        row += [show_value(group.settings[key]) if key in group.settings else "" for key in keys]
        row += [group.num_seeds, len(group.unfinished)]
        for column in columns:
            estimate = column.estimate(group)
            row += ["", ""] if estimate is None else [estimate.mean, _blank(estimate.deviation)]
        rows = references.get(group.recipe, ())
        row.append("; ".join(str(r.test_error.mean) for r in rows))
        row.append("; ".join(str(_blank(r.test_error.deviation)) for r in rows))
        row.append("; ".join(", ".join(part for part in (r.paper, r.table, r.method) if part) for r in rows))
        writer.writerow(row)
    return text.getvalue()


def _blank(value: float | None) -> float | str:
    return "" if value is None else value
