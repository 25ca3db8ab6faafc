"""Recipes and runs of Learning by Teaching."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat

import mlo
from mlo.recipes import LevelRecipe, Recipe, RecipePart
from problems.data import Splits, Together, loader
from problems.lbt import LearningByTeaching
from problems.search_experiment import SearchExperiment, SearchRecipe
from problems.search_recipes import Stage, StudentRecipe


class LBTLevels(RecipePart):
    """The three levels."""

    teacher: LevelRecipe
    student: LevelRecipe
    architecture: LevelRecipe


class LBTRecipe(SearchRecipe):
    """A run of Learning by Teaching.

    Attributes:
        lambda_: weight of the pseudo-labelled images in eq. (2); `lambda` in a recipe.
        gamma: weight of the student's validation loss in eq. (3).
        complete_gradient: differentiate the pseudo-labels' direct dependence on A too.
        teacher_weight: of the teacher's validation loss in eq. (3); 0 for the first ablation.
        labelled_weight: of the labelled images in eq. (2); 0 for the second ablation.
        student: the student.
        levels: optimizer, schedule and estimator of each level.
    """

    lambda_: Annotated[NonNegativeFloat, Field(alias="lambda")] = 1.0
    gamma: NonNegativeFloat = 1.0
    complete_gradient: bool = False
    teacher_weight: NonNegativeFloat = 1.0
    labelled_weight: NonNegativeFloat = 1.0
    student: StudentRecipe
    levels: LBTLevels


class LBTExperiment(SearchExperiment):
    """Learning by Teaching in any search space of the DARTS family."""

    recipe_type: ClassVar[type[Recipe]] = LBTRecipe

    def declare(self, stage: Stage, data: Splits) -> mlo.Graph:
        """Build teacher, student and architecture."""
        recipe: LBTRecipe = self.recipe
        levels, size = recipe.levels, recipe.batch_size
        supernet = stage.supernet(recipe.supernet, data.num_classes, data.in_channels)
        student = recipe.student.build(data.num_classes, data.in_channels)
        architecture = stage.architecture()
        lbt = LearningByTeaching(
            recipe.lambda_, recipe.gamma, recipe.complete_gradient, recipe.teacher_weight, recipe.labelled_weight
        )
        teacher_train, student_train, unlabelled = (
            loader(data.augmented(part), size, num_workers=data.num_workers)
            for part in (data.teacher_train, data.student_train, data.unlabelled)
        )
        validation = loader(data.plain(data.validation), size, num_workers=data.num_workers)
        upper_steps = recipe.rounds * levels.architecture.steps
        return mlo.Graph(
            levels=[
                levels.teacher.declare(
                    "teacher", supernet, lbt.teacher_loss, teacher_train, total_steps=upper_steps * levels.teacher.steps
                ),
                levels.student.declare(
                    "student",
                    student,
                    lbt.student_loss,
                    Together(student_train, unlabelled),
                    total_steps=upper_steps * levels.student.steps,
                ),
                levels.architecture.declare(
                    "architecture",
                    architecture,
                    lbt.architecture_loss,
                    Together(validation, validation),
                    total_steps=upper_steps,
                ),
            ],
            edges=lbt.edges,
        )
