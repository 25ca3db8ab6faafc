"""Published figures, to stand beside those of runs: `references.yaml` in the bundled recipes' folders.

Such a file is data: a list of rows, each with the recipe that it belongs to and the paper that it is from. Called by
`mlo.comparison.tables`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError

from mlo.errors import RecipeError
from mlo.recipes import BUNDLED_FOLDERS, RecipePart
from mlo.recipes.files import REFERENCES
from mlo.recipes.messages import word_errors
from mlo.recipes.strict_yaml import parse_yaml

Percent = Annotated[float, Field(ge=0, le=100)]


class PublishedError(RecipePart):
    """An error on the test set, in percent.

    Attributes:
        mean: over the paper's runs.
        deviation: standard deviation over them, where the paper has it.
    """

    mean: Percent
    deviation: NonNegativeFloat | None = None

    def show(self, least_decimals: int) -> str:
        """Write it with the decimals that it was given with, or more."""
        decimals = max(least_decimals, *(_decimals(number) for number in (self.mean, self.deviation or 0.0)))
        spread = "" if self.deviation is None else f" ± {self.deviation:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


class Reference(RecipePart):
    """A published row that a recipe is meant to reproduce.

    Attributes:
        recipe: name of the bundled recipe.
        paper: method, authors and year.
        table: of the paper, where known.
        method: what the row is about, such as "second order".
        test_error: top-1.
        top5_error: likewise.
        weights: of the evaluated network, in millions.
        search_days: search cost in days of one device, the paper's.
    """

    recipe: str
    paper: str
    table: str = ""
    method: str = ""
    test_error: PublishedError
    top5_error: PublishedError | None = None
    weights: PositiveFloat | None = None
    search_days: NonNegativeFloat | None = None

    @property
    def error(self) -> str:
        """The error alone, in percent: top-1, or top-1 / top-5."""
        first = self.test_error.show(2 if self.test_error.mean < 10 else 1)
        return first if self.top5_error is None else f"{first} / {self.top5_error.show(1)}"

    @property
    def sentence(self) -> str:
        """All figures and where they are from."""
        source = ", ".join(text for text in (self.paper, self.table, self.method) if text)
        parts = [f"test error {self.error} %"]
        if self.weights is not None:
            parts.append(f"{self.weights:g} M weights")
        if self.search_days is not None:
            parts.append(f"search {self.search_days:g} device days")
        return f"{source}: {', '.join(parts)}"


class _References(RecipePart):
    rows: list[Reference]


def read_references(path: Path) -> list[Reference]:
    """Read one `references.yaml`.

    Raises:
        RecipeError: it is not a list of rows, or a row has an unknown key or a wrong value; all are named at once.
    """
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, list):
        raise RecipeError(f"{path}: expected a list of rows, each beginning with '- recipe: NAME'; found {data!r:.60}")
    try:
        return _References.model_validate_json(json.dumps({"rows": data}), strict=True).rows
    except ValidationError as error:
        findings = word_errors(error, {"rows": data}, _References)
        lines = [replace(found, path=(f"row {int(found.path[1]) + 1}", *found.path[2:])) for found in findings]
        raise RecipeError("\n".join([f"{path} is not valid:", *(f"  {line}" for line in lines)])) from error


def published(folders: Sequence[Path] = BUNDLED_FOLDERS) -> dict[str, list[Reference]]:
    """Read all reference tables of the bundled recipes: the rows of each recipe, by its name.

    Raises:
        RecipeError: a table is not valid.
    """
    rows: dict[str, list[Reference]] = {}
    for folder in [folder for folder in folders if folder.is_dir()][:1]:  # the installed copy's, or the source tree's
        for path in sorted(folder.rglob(REFERENCES)):
            for row in read_references(path):
                rows.setdefault(row.recipe, []).append(row)
    return rows


def _decimals(number: float) -> int:
    return len(f"{number:f}".rstrip("0").partition(".")[2])
