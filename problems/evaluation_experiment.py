"""The evaluation phase as a run of its own: `mlo evaluate` trains a genotype's network from scratch and tests it.

The folder has, beside what every run leaves, the genotype with its pictures, the confusion matrix of the test images,
the learning curves, and the trained network (`network/`, see `problems.search_spaces.load_network`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from pydantic import PositiveInt, field_validator

import mlo
from mlo.recipes import Recipe
from mlo.runs import Experiment, Run, write_json
from mlo.tracking import read_metrics
from problems.confusion import draw_confusion, write_confusion
from problems.data import DataRecipe, Splits
from problems.evaluation import EvaluationRecipe, evaluation_graph
from problems.measures import multiply_adds, num_parameters, predict
from problems.report import draw_curves, write_report
from problems.search_experiment import draw_genotype, seeded
from problems.search_spaces import EvaluationNetwork, Genotype, export_network, find_genotype


class EvaluationRunRecipe(Recipe):
    """A training from scratch.

    Attributes:
        rounds: at which the training ends, where the epochs would make more; the schedules then span these.
        data: the images.
        genotype: a published one by its name, or what a search wrote into its genotype.json.
        evaluation: of its network.
    """

    rounds: PositiveInt | None = None  # type: ignore[assignment]
    data: DataRecipe
    genotype: str | dict[str, Any]
    evaluation: EvaluationRecipe

    @field_validator("genotype")
    @classmethod
    def _check_genotype(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        _genotype(value)
        return value


class EvaluationExperiment(Experiment):
    """Train the network of a genotype from scratch, and test it once."""

    recipe_type: ClassVar[type[Recipe]] = EvaluationRunRecipe

    def __init__(self, recipe: EvaluationRunRecipe) -> None:
        self.recipe = recipe

    def graph(self) -> mlo.Graph:
        """Build the network, freshly initialized from the recipe's seed."""
        return self._build(self.data)[0]

    @cached_property
    def data(self) -> Splits:
        """The images, read once: a recipe is checked by building its graph before it is run."""
        return self.recipe.data.build(self.recipe.seed)

    def run(self, run: Run) -> Mapping[str, Any]:
        """Train, test, draw and export."""
        recipe, folder, data = self.recipe, run.folder, self.data
        run.holds("images", data.fingerprint())
        genotype = _genotype(recipe.genotype)
        write_json(folder / "genotype.json", genotype.to_json())
        draw_genotype(folder, genotype)
        graph, rounds = self._build(data)
        network = run.train("evaluation", graph, rounds).graph["network"].module
        assert isinstance(network, EvaluationNetwork)
        export_network(network, folder / "network")
        draw_curves(folder / "curves.png", read_metrics(folder / "metrics.jsonl"))
        # The test images are read here, once, after all training.
        predictions = predict(network, data.plain(data.test), num_workers=data.num_workers)
        confusion = predictions.confusion()
        write_confusion(folder / "confusion.csv", confusion, data.class_names)
        for suffix in ("svg", "png"):
            draw_confusion(folder / f"confusion.{suffix}", confusion, data.class_names)
        return {
            **predictions.errors(),
            "num_parameters": num_parameters(network),
            "multiply_adds": multiply_adds(network, data.in_channels, data.image_size),
            "evaluation_seconds": run.seconds("evaluation"),
        }

    def report(self, run: Run) -> None:
        """Write the page that shows the run."""
        write_report(run.folder)

    def _build(self, data: Splits) -> tuple[mlo.Graph, int]:
        recipe = self.recipe
        with seeded(recipe.seed, "evaluation"):
            return evaluation_graph(recipe.evaluation, _genotype(recipe.genotype), data, max_rounds=recipe.rounds)


def _genotype(value: str | dict[str, Any]) -> Genotype:
    return find_genotype(value) if isinstance(value, str) else Genotype.from_json(value)
