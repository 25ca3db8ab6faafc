"""Runs beside each other: tables over seeds and settings, as `mlo report` writes them.

The files of this package, in the order in which runs pass through them: `found` finds and reads them, `groups` puts
those together that differ in their seeds only, `columns` estimates their figures, `significance` compares with random
cells, `references` knows published figures, `tables` and `curves` show it all, and `report` writes the files.
"""

from mlo.comparison.columns import Column, Estimate, choose_columns
from mlo.comparison.curves import Curve, draw_curve, find_curves
from mlo.comparison.found import FoundRun, find_runs
from mlo.comparison.groups import Group, group_runs
from mlo.comparison.references import PublishedError, Reference, published, read_references
from mlo.comparison.report import write_comparison
from mlo.comparison.significance import compare_with_random
from mlo.comparison.tables import Table, make_table, to_csv, to_latex, to_markdown

__all__ = [
    "Column",
    "Curve",
    "Estimate",
    "FoundRun",
    "Group",
    "PublishedError",
    "Reference",
    "Table",
    "choose_columns",
    "compare_with_random",
    "draw_curve",
    "find_curves",
    "find_runs",
    "group_runs",
    "make_table",
    "published",
    "read_references",
    "to_csv",
    "to_latex",
    "to_markdown",
    "write_comparison",
]
