"""The run of Learning by Teaching: search, discretize, train the found and a random cell from scratch, test, report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

import mlo
from mlo.drawing import draw_graph
from mlo.randomness import random_key
from mlo.recipes import LevelRecipe, Recipe, RecipePart
from mlo.runs import Experiment, Run, write_json
from mlo.tracking import read_metrics
from problems.data import DataRecipe, DigitsRecipe, Splits, Together, loader
from problems.evaluation import EvaluationRecipe, error_rate, evaluation_graph, num_parameters
from problems.lbt import LearningByTeaching
from problems.report import draw_curves, write_report
from problems.search_spaces import DARTS, Architecture, Genotype, Supernet, random_genotype
from problems.search_spaces.drawing import draw_alphas, draw_cell
from problems.students import StudentResNet


class SupernetRecipe(RecipePart):
    """The teacher's network in the search.

    Attributes:
        channels: of the first cells.
        num_cells: cells.
    """

    channels: PositiveInt
    num_cells: PositiveInt


class StudentRecipe(RecipePart):
    """The student's network.

    Attributes:
        depth: of the ResNet.
        width: channels of its first stage.
        small_images: the stem for small images.
    """

    depth: Literal[18, 50] = 18
    width: PositiveInt = 64
    small_images: bool = True


class LBTLevels(RecipePart):
    """The three levels."""

    teacher: LevelRecipe
    student: LevelRecipe
    architecture: LevelRecipe


class LBTRecipe(Recipe):
    """A run of Learning by Teaching.

    Attributes:
        data: the images.
        batch_size: images of each kind in a batch.
        lambda_: weight of the pseudo-labelled images in eq. (2); `lambda` in a recipe.
        gamma: weight of the student's validation loss in eq. (3).
        complete_gradient: differentiate the pseudo-labels' direct dependence on A too.
        supernet: the teacher.
        student: the student.
        levels: optimizer, schedule and estimator of each level.
        evaluation: of the found cell.
    """

    data: DataRecipe = DigitsRecipe()
    batch_size: PositiveInt
    lambda_: Annotated[NonNegativeFloat, Field(alias="lambda")] = 1.0
    gamma: NonNegativeFloat = 1.0
    complete_gradient: bool = False
    supernet: SupernetRecipe
    student: StudentRecipe
    levels: LBTLevels
    evaluation: EvaluationRecipe


class LBTExperiment(Experiment):
    """Learning by Teaching in the search space of DARTS."""

    recipe_type: ClassVar[type[Recipe]] = LBTRecipe

    def __init__(self, recipe: LBTRecipe) -> None:
        self.recipe = recipe

    def graph(self) -> mlo.Graph:
        """Build teacher, student and architecture, freshly initialized from the recipe's seed."""
        recipe, data = self.recipe, self.recipe.data.build(self.recipe.seed)
        with _seeded(recipe.seed, "search"):
            supernet = Supernet(data.num_classes, recipe.supernet.channels, recipe.supernet.num_cells, data.in_channels)
            student = StudentResNet(
                recipe.student.depth,
                data.num_classes,
                data.in_channels,
                width=recipe.student.width,
                small_images=recipe.student.small_images,
            )
            architecture = Architecture(DARTS)
        lbt = LearningByTeaching(recipe.lambda_, recipe.gamma, recipe.complete_gradient)
        size, levels = recipe.batch_size, recipe.levels
        teacher_train = loader(data.augmented(data.teacher_train), size, num_workers=data.num_workers)
        student_train = loader(data.augmented(data.student_train), size, num_workers=data.num_workers)
        unlabelled = loader(data.augmented(data.unlabelled), size, num_workers=data.num_workers)
        validation = loader(data.plain(data.validation), size, num_workers=data.num_workers)
        steps = {
            "teacher": recipe.rounds * levels.teacher.steps * levels.architecture.steps,
            "student": recipe.rounds * levels.student.steps * levels.architecture.steps,
            "architecture": recipe.rounds * levels.architecture.steps,
        }
        return mlo.Graph(
            levels=[
                levels.teacher.declare(
                    "teacher", supernet, lbt.teacher_loss, teacher_train, total_steps=steps["teacher"]
                ),
                levels.student.declare(
                    "student",
                    student,
                    lbt.student_loss,
                    Together(student_train, unlabelled),
                    total_steps=steps["student"],
                ),
                levels.architecture.declare(
                    "architecture",
                    architecture,
                    lbt.architecture_loss,
                    Together(validation, validation),
                    total_steps=steps["architecture"],
                ),
            ],
            edges=lbt.edges,
        )

    def run(self, run: Run) -> Mapping[str, Any]:
        """Search, evaluate, and write the pictures and the report."""
        recipe, folder = self.recipe, run.folder
        data = recipe.data.build(recipe.seed)
        graph = self.graph()
        draw_graph(graph, folder / "graph.svg")
        architecture = graph["architecture"].module
        assert isinstance(architecture, Architecture)
        before = {name: p.detach().clone() for name, p in architecture.named_parameters()}
        relaxed_before = _relaxed(architecture)
        run.train("search", graph, recipe.rounds, rollback=recipe.rollback, diagnostics_every=recipe.diagnostics_every)
        genotype = architecture.discretize()
        write_json(folder / "genotype.json", genotype.to_json())
        for cell, edges, concat in (
            ("normal", genotype.normal, genotype.normal_concat),
            ("reduce", genotype.reduce, genotype.reduce_concat),
        ):
            for suffix in ("svg", "png"):
                draw_cell(edges, concat, folder / f"cell_{cell}.{suffix}", f"{cell} cell")
        draw_alphas(folder / "alphas.png", _relaxed(architecture), DARTS.normal[0], initial=relaxed_before)

        generator = torch.Generator().manual_seed(random_key(recipe.seed, "random cell"))
        found = self._evaluate(run, "evaluation", genotype, data)
        random = self._evaluate(run, "random_cell", random_genotype(generator, DARTS), data)
        # The test images are read here, once, after all training.
        result = {
            "test_error": error_rate(found, data.plain(data.test), num_workers=data.num_workers),
            "random_cell_test_error": error_rate(random, data.plain(data.test), num_workers=data.num_workers),
            "alpha_change": float(
                sum(
                    (p.detach().cpu() - before[name].cpu()).square().sum()
                    for name, p in architecture.named_parameters()
                )
                ** 0.5
            ),
            "num_parameters": num_parameters(found),
            "search_seconds": run.seconds("search"),
            "evaluation_seconds": run.seconds("evaluation"),
        }
        draw_curves(folder / "curves.png", read_metrics(folder / "metrics.jsonl"))
        return result

    def report(self, run: Run) -> None:
        """Write the page that shows the run."""
        write_report(run.folder)

    def _evaluate(self, run: Run, phase: str, genotype: Genotype, data: Splits) -> Any:
        with _seeded(self.recipe.seed, "evaluation"):
            graph, rounds = evaluation_graph(self.recipe.evaluation, genotype, data)
        run.train(phase, graph, rounds)
        return graph["network"].module


@contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw initial weights from the run's seed, and give torch's global generator back unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_key(seed, purpose, "initialization"))
        yield


def _relaxed(architecture: Architecture) -> dict[str, Any]:
    with torch.no_grad():
        return {name: weights.cpu().numpy() for name, weights in architecture()._asdict().items()}
