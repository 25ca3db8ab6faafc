"""The figures that a table of runs shows, and how a mean over seeds is written.

Called by `mlo.comparison.tables` and `mlo.comparison.curves`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlo.comparison.found import is_number
from mlo.comparison.groups import Group
from mlo.errors import MloError
from mlo.recipes.messages import did_you_mean

_DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Column:
    """A figure of `result.json`.

    Attributes:
        key: its name there.
        title: of the column, with the unit.
        unit: what a value is divided by.
        decimals: at least so many.
    """

    key: str
    title: str
    unit: float = 1.0
    decimals: int = 2

    def estimate(self, group: Group) -> Estimate | None:
        """Estimate the figure from a group; None if no finished run has it."""
        values = [value / self.unit for value in group.figures(self.key).values()]
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Estimate(statistics.fmean(values), deviation, len(values))

    def show(self, estimate: Estimate | None) -> str:
        """Write an estimate: small numbers with two digits, others with the column's decimals."""
        if estimate is None:
            return "—"
        size = abs(estimate.mean)
        decimals = self.decimals
        if 0 < size < 1:
            decimals = max(decimals, 1 - math.floor(math.log10(size)))
        if decimals > 6:
            parts = [f"{x:.2g}" for x in (estimate.mean, estimate.deviation) if x is not None]
        else:
            parts = [f"{x:.{decimals}f}" for x in (estimate.mean, estimate.deviation) if x is not None]
        return " ± ".join(parts)


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds.

    Attributes:
        mean: over them.
        deviation: sample standard deviation over them; None for one seed.
        num_seeds: seeds.
    """

    mean: float
    deviation: float | None
    num_seeds: int


STANDARD = (
    Column("test_error", "test error (%)"),
    Column("test_error_top5", "top-5 test error (%)"),
    Column("num_parameters", "weights (M)", 1e6),
    Column("search_seconds", "search (device days)", _DAY),
)
"""What a table shows of the runs that have it."""


def choose_columns(groups: Sequence[Group], metrics: Iterable[str] = ()) -> list[Column]:
    """Choose the columns: of `STANDARD` those that some run has, and `metrics`.

    Raises:
        MloError: no run has a number of this name.
    """
    results = [run.result for group in groups for run in group.finished if run.result is not None]
    known = {key for result in results for key, value in result.items() if is_number(value) and key != "seed"}
    columns = [column for column in STANDARD if any(column.key in result for result in results)]
    for key in metrics:
        if key not in known:
            names = ", ".join(sorted(known)) or "none, since no run is finished"
            raise MloError(f"--metrics {key}: expected figures of the runs: {names}{did_you_mean(key, known)}")
        if key not in {column.key for column in columns}:
            columns.append(Column(key, key))
    return columns
