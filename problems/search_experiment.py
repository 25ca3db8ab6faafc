"""The run of an architecture search: search, discretize, train the found and a random cell from scratch, test, report.

`LBTExperiment` and `DARTSExperiment` supply the graph of levels; everything else is the same for both.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt, ValidationInfo, field_validator

import mlo
from mlo.drawing import draw_graph
from mlo.randomness import random_key
from mlo.recipes import Recipe
from mlo.runs import Experiment, Run, write_json
from mlo.tracking import read_metrics
from problems.data import BatchSize, DataRecipe, DigitsRecipe, Splits
from problems.evaluation import EvaluationRecipe, evaluation_batches, evaluation_graph
from problems.measures import num_parameters, predict
from problems.report import draw_curves, write_report
from problems.search_recipes import DARTSRecipe, PCDARTSRecipe, SpaceRecipe, Stage, SupernetRecipe
from problems.search_spaces import PRIMITIVES, Architecture, Genotype, SearchSpace, random_genotype
from problems.search_spaces.drawing import draw_alphas, draw_cell
from problems.search_spaces.stopping import SkipLimit


class SearchRecipe(Recipe):
    """A search; `rounds` are those of each stage.

    Attributes:
        data: the images.
        batch_size: images of each kind in a batch, at least 2.
        space: the search space.
        supernet: the relaxed network.
        stop_at_skips: end the search as soon as the normal cell has so many skip-connections (DARTS+), or None.
        evaluation: of the found cell.
        random_cell: train and test a random cell of the space too, under the same budget.
    """

    data: DataRecipe = DigitsRecipe()
    batch_size: BatchSize
    space: SpaceRecipe = DARTSRecipe()
    supernet: SupernetRecipe
    stop_at_skips: PositiveInt | None = None
    evaluation: EvaluationRecipe
    random_cell: bool = True

    @field_validator("supernet")
    @classmethod
    def _check_channels(cls, value: SupernetRecipe, info: ValidationInfo) -> SupernetRecipe:
        space = info.data.get("space")
        if isinstance(space, PCDARTSRecipe) and value.channels % space.k:
            raise ValueError(f"channels: expected a multiple of space.k = {space.k}; found {value.channels}")
        return value


class SearchExperiment(Experiment):
    """What the searches have in common."""

    recipe: Any

    def __init__(self, recipe: SearchRecipe) -> None:
        self.recipe = recipe

    def graph(self) -> mlo.Graph:
        """Build the levels of the first stage, freshly initialized from the recipe's seed.

        Raises:
            MloError: the batches of the search, or of the evaluation after it, do not fit the data or the processes.
        """
        evaluation_batches(self.recipe.evaluation, self.data)
        return self._stage_graph(0, self.recipe.space.stage(0, None), self.data)

    @cached_property
    def data(self) -> Splits:
        """The images, read once: a recipe is checked by building its graph before it is run."""
        splits: Splits = self.recipe.data.build(self.recipe.seed)
        return splits

    @abc.abstractmethod
    def declare(self, stage: Stage, data: Splits) -> mlo.Graph:
        """Declare the levels of a stage, one of them called `architecture`; torch's generator has been seeded.

        Args:
            stage: which primitives compete, and how.
            data: the images.
        """

    def run(self, run: Run) -> Mapping[str, Any]:
        """Search, evaluate, and write the pictures."""
        recipe, folder, data = self.recipe, run.folder, self.data
        run.holds("images", data.fingerprint())
        waits = recipe.levels.architecture.warmup_rounds
        if waits >= recipe.rounds:
            warnings.warn(
                f"levels.architecture.warmup_rounds: expected fewer than the {recipe.rounds} rounds; found {waits}, so "
                f"that the architecture is not trained. Lower it, as by --set levels.architecture.warmup_rounds=0.",
                stacklevel=2,
            )
        phases: list[str] = []
        architecture: Architecture | None = None
        for index in range(recipe.space.num_stages):
            graph = self._stage_graph(index, recipe.space.stage(index, architecture), data)
            if index == 0:
                draw_graph(graph, folder / "graph.svg")
            architecture = _architecture(graph)
            before = {name: p.detach().clone() for name, p in architecture.named_parameters()}
            relaxed_before = _probabilities(architecture)
            phases.append("search" if recipe.space.num_stages == 1 else f"search_{index + 1}")
            engine = run.train(
                phases[-1],
                graph,
                recipe.rounds,
                until=self._until(architecture),
                rollback=recipe.rollback,
                diagnostics_every=recipe.diagnostics_every,
            )
        assert architecture is not None
        genotype = architecture.discretize(max_skips=recipe.space.max_skips)
        write_json(folder / "genotype.json", genotype.to_json())
        draw_genotype(folder, genotype)
        draw_alphas(
            folder / "alphas.png",
            _probabilities(architecture),
            _primitives(architecture.space),
            initial=relaxed_before,
        )
        figures: dict[str, Any] = {
            "search_rounds": engine.rounds_done,
            "alpha_change": float(
                sum((p.detach() - before[name].to(p)).square().sum() for name, p in architecture.named_parameters())
                ** 0.5
            ),
            "search_seconds": sum(map(run.seconds, phases)),
        }
        figures |= self._evaluate_both(run, genotype, data)
        draw_curves(folder / "curves.png", read_metrics(folder / "metrics.jsonl"))
        return figures

    def report(self, run: Run) -> None:
        """Write the page that shows the run."""
        write_report(run.folder)

    def _stage_graph(self, index: int, stage: Stage, data: Splits) -> mlo.Graph:
        with seeded(self.recipe.seed, "search" if index == 0 else f"search {index}"):
            return self.declare(stage, data)

    def _until(self, architecture: Architecture) -> Any:
        if self.recipe.stop_at_skips is None:
            return None
        limit = SkipLimit(self.recipe.stop_at_skips)
        return lambda: limit(architecture)

    def _evaluate_both(self, run: Run, genotype: Genotype, data: Splits) -> dict[str, Any]:
        """Train the found cell, and a random one; then, once, read the test images."""
        networks = {"": self._evaluate(run, "evaluation", genotype, data)}
        if self.recipe.random_cell:
            generator = torch.Generator().manual_seed(random_key(self.recipe.seed, "random cell"))
            drawn = random_genotype(generator, self.recipe.space.space())
            networks["random_cell_"] = self._evaluate(run, "random_cell", drawn, data)
        test = data.plain(data.test)
        errors: dict[str, float] = {}
        for prefix, network in networks.items():
            predictions = predict(network, test, num_workers=data.num_workers)
            errors |= {f"{prefix}{name}": error for name, error in predictions.errors().items()}
        return {
            **errors,
            "num_parameters": num_parameters(networks[""]),
            "evaluation_seconds": run.seconds("evaluation"),
        }

    def _evaluate(self, run: Run, phase: str, genotype: Genotype, data: Splits) -> Any:
        with seeded(self.recipe.seed, "evaluation"):
            graph, rounds = evaluation_graph(self.recipe.evaluation, genotype, data)
        run.train(phase, graph, rounds)
        return graph["network"].module


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Draw initial weights from the run's seed, and give torch's global generator back unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_key(seed, purpose, "initialization"))
        yield


def _architecture(graph: mlo.Graph) -> Architecture:
    module = graph["architecture"].module
    assert isinstance(module, Architecture)
    return module


def draw_genotype(folder: Path, genotype: Genotype) -> None:
    """Write the pictures of both cells into a folder."""
    for cell, edges, concat in (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduce", genotype.reduce, genotype.reduce_concat),
    ):
        for suffix in ("svg", "png"):
            draw_cell(edges, concat, folder / f"cell_{cell}.{suffix}", f"{cell} cell")


def _primitives(space: SearchSpace) -> tuple[str, ...]:
    """All primitives of a space, whose edges may have different ones, in the order of `PRIMITIVES`."""
    present = {name for names in (*space.normal, *space.reduce) for name in names}
    return tuple(name for name in PRIMITIVES if name in present)


@torch.no_grad()
def _probabilities(architecture: Architecture) -> dict[str, Any]:
    """The scores of each cell as arrays of shape (edges, all primitives of the space), NaN where an edge lacks one."""
    space, scores = architecture.space, architecture.scores()
    names = _primitives(space)

    def spread(matrix: torch.Tensor, primitives: Sequence[Sequence[str]]) -> Any:
        full = matrix.new_full((len(primitives), len(names)), float("nan"))
        for row, (edge, weights) in enumerate(zip(primitives, matrix, strict=True)):
            full[row, [names.index(name) for name in edge]] = weights
        return full.cpu().numpy()

    return {"normal": spread(scores.normal, space.normal), "reduce": spread(scores.reduce, space.reduce)}
