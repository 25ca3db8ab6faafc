"""Recipes and runs of plain differentiable architecture search."""

from __future__ import annotations

from typing import ClassVar

import mlo
from mlo.recipes import LevelRecipe, Recipe, RecipePart
from problems.darts import ArchitectureSearch
from problems.data import Splits, loader
from problems.search_experiment import SearchExperiment, SearchRecipe
from problems.search_recipes import Stage


class SearchLevels(RecipePart):
    """The two levels."""

    network: LevelRecipe
    architecture: LevelRecipe


class DARTSSearchRecipe(SearchRecipe):
    """A run of plain differentiable architecture search.

    Attributes:
        levels: optimizer, schedule and estimator of each level.
    """

    levels: SearchLevels


class DARTSExperiment(SearchExperiment):
    """Architecture search without a student, in any search space of the DARTS family."""

    recipe_type: ClassVar[type[Recipe]] = DARTSSearchRecipe

    def declare(self, stage: Stage, data: Splits) -> mlo.Graph:
        """Build network and architecture."""
        recipe: DARTSSearchRecipe = self.recipe
        levels = recipe.levels
        supernet = stage.supernet(recipe.supernet, data.num_classes, data.in_channels)
        architecture = stage.architecture()
        search = ArchitectureSearch()
        train, validation = (
            loader(part, recipe.batch_size, num_workers=data.num_workers)
            for part in (data.augmented(data.teacher_train), data.plain(data.validation))
        )
        upper_steps = recipe.rounds * levels.architecture.steps
        return mlo.Graph(
            levels=[
                levels.network.declare(
                    "network", supernet, search.network_loss, train, total_steps=upper_steps * levels.network.steps
                ),
                levels.architecture.declare(
                    "architecture",
                    architecture,
                    search.architecture_loss,
                    validation,
                    total_steps=upper_steps,
                ),
            ],
            edges=search.edges,
        )
