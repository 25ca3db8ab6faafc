"""The toy experiment as an installed problem with settings, for commands that start processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from mlo.errors import MloError
from mlo.recipes import Recipe

from .toy_experiment import ToyExperiment

ROOT = Path(__file__).resolve().parents[1]


class SweptRecipe(Recipe):
    rounds: PositiveInt = 2
    penalty: float = 1.0
    variant: str = "plain"
    fails: Literal["never", "once", "always"] = "never"


class SweptExperiment(ToyExperiment):
    recipe_type = SweptRecipe

    def graph(self):
        if self.recipe.variant == "impossible":
            raise MloError("variant: expected one that can be built; found impossible")
        return super().graph()

    def run(self, run):
        found = super().run(run)
        mark = run.folder / "failed-once"
        if self.recipe.fails == "always" or (self.recipe.fails == "once" and not mark.exists()):
            mark.touch()
            raise RuntimeError("the toy broke, as it was told to")
        error = 3.0 + 0.1 * self.recipe.seed + (self.recipe.penalty - 1.0) ** 2
        return {**found, "test_error": error, "random_cell_test_error": error + 0.5, "num_parameters": 3_300_000}


def install(monkeypatch, folder: Path) -> Path:
    """Declare the problem "swept" to this process and to those that it starts; returns a recipe of it.

    The declaration takes the place of that of the installed package, so that the bundled problems, whose import takes
    seconds, are not loaded.
    """
    declaration = folder / "site" / "mlo-0.dist-info"
    declaration.mkdir(parents=True)
    (declaration / "METADATA").write_text("Metadata-Version: 2.1\nName: mlo\nVersion: 0\n")
    (declaration / "entry_points.txt").write_text("[mlo.problems]\nswept = tests.swept_experiment:SweptExperiment\n")
    monkeypatch.syspath_prepend(declaration.parent)
    monkeypatch.setenv("PYTHONPATH", f"{declaration.parent}:{ROOT}")
    recipe = folder / "swept.yaml"
    recipe.write_text("problem: swept\nthreads: 1\n")
    return recipe
