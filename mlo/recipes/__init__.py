"""Recipes: strict, typed YAML descriptions of a run.

The files of this package, in the order in which a recipe passes through them: `files` finds the file and what it
extends, `strict_yaml` reads the text, `overrides` applies `--set`, `loading` checks the outcome against the problem's
schema, and `messages` words whatever is wrong. A schema is made of `kinds`, `levels` and
`schedulers`.
"""

from mlo.recipes.files import BUNDLED_FOLDERS, find_recipe, list_recipes
from mlo.recipes.kinds import Buildable, RecipePart, kind_union
from mlo.recipes.levels import HypergradientRecipe, LevelRecipe, OptimizerRecipe
from mlo.recipes.loading import DeclaredProblem, Recipe, dump_recipe, installed_problems, load_recipe
from mlo.recipes.schedulers import SchedulerRecipe

__all__ = [
    "BUNDLED_FOLDERS",
    "Buildable",
    "DeclaredProblem",
    "HypergradientRecipe",
    "LevelRecipe",
    "OptimizerRecipe",
    "Recipe",
    "RecipePart",
    "SchedulerRecipe",
    "dump_recipe",
    "find_recipe",
    "installed_problems",
    "kind_union",
    "list_recipes",
    "load_recipe",
]
