"""How often a recipe's networks are passed through in a round, counted in a small twin of the recipe."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mlo
from mlo.recipes import installed_problems, load_recipe
from problems.data.recipes import CIFAR10Recipe, CIFAR100Recipe, DigitsRecipe, ImageNetRecipe
from problems.lbt_experiment import LBTExperiment, LBTRecipe

from ..speed.timing import uncollected
from .cost import Counts, Pass, Search

TWIN = (
    "data={kind: digits}",
    "batch_size=4",
    "supernet={channels: 4, num_cells: 1}",
    "student.width=12",
    "student.small_images=true",
    "levels.architecture.warmup_rounds=2",
)
"""Turns a recipe into one that makes the same passes of networks that take no time."""


def read(name: str, overrides: Sequence[str]) -> LBTRecipe:
    """Load a recipe whose cost can be counted in passes.

    Raises:
        MloError: it is of another problem, has several stages, or differentiates otherwise than by differences.
    """
    recipe = load_recipe(
        name, overrides, schemas={key: problem.recipe_type for key, problem in installed_problems().items()}
    )
    if not isinstance(recipe, LBTRecipe):
        raise mlo.MloError(f"{name}: expected a recipe of the problem lbt; found {recipe.problem}")
    if recipe.space.num_stages > 1:
        raise mlo.MloError(f"{name}: expected a space of one stage; found {recipe.space.kind}, whose networks change")
    for level, own in (("teacher", recipe.levels.teacher), ("student", recipe.levels.student)):
        estimator = own.hypergradient.build()
        if not isinstance(estimator, (mlo.FiniteDifference, mlo.FirstOrder)):
            raise mlo.MloError(
                f"{name}, level {level}: expected finite_difference or first_order, which make ordinary passes; found "
                f"{estimator!r}. Add levels.{level}.hypergradient.kind=finite_difference."
            )
    return recipe


def images_of(recipe: LBTRecipe) -> tuple[int, int, int]:
    """Return channels, side and classes of a recipe's images.

    Raises:
        MloError: only the data would tell.
    """
    match recipe.data:
        case ImageNetRecipe(image_size=side):
            return 3, side, 1000
        case CIFAR10Recipe():
            return 3, 32, 10
        case CIFAR100Recipe():
            return 3, 32, 100
        case DigitsRecipe():
            return 1, 8, 10
    raise mlo.MloError(f"data: expected imagenet, cifar10, cifar100 or digits; found {recipe.data.kind}")


class Watch:
    """Counts the passes of a module, and how many tensors there are at most of one of its weights when a pass begins.

    A weight, its gradient, the optimizer's state and what is recorded of them all have the weight's shape, which must
    be one that nothing else has.
    """

    def __init__(self, name: str, module: nn.Module, weight: Tensor) -> None:
        self.name, self.shape = name, weight.shape
        self.counts: Counts = Counter()
        self.copies = 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: object) -> None:
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.shape == self.shape]
        self.copies = max(self.copies, len({t.untyped_storage().data_ptr() for t in tensors}))

    def _after(self, module: nn.Module, args: object, output: Tensor) -> None:
        lower = torch.is_autocast_enabled("cpu")
        self.counts[Pass(self.name, backward=False, lower=lower)] += 1
        if output.requires_grad:
            output.register_hook(lambda _: self.counts.update([Pass(self.name, backward=True, lower=lower)]))


def count(name: str, overrides: Sequence[str]) -> Search:
    """Return what a recipe asks for, with the passes and the copies of the weights that were counted in its twin."""
    asked = read(name, overrides)
    channels, side, _ = images_of(asked)
    teacher_level, student_level, top = asked.levels.teacher, asked.levels.student, asked.levels.architecture
    recipe = read(name, [*overrides, *TWIN])
    with uncollected():  # what was there before is none of the weights
        graph = LBTExperiment(recipe).graph()
        teacher, student = graph["teacher"].module, graph["student"].module
        watches = [
            Watch("teacher", teacher, teacher.get_parameter("classifier.weight")),
            Watch("student", student, student.get_parameter("fc.weight")),
        ]
        engine = mlo.Engine(graph, seed=0, device="cpu", precision=recipe.precision, rollback=recipe.rollback)
        engine.run(1, progress=False)  # what is traced once is over
        rounds: list[Counts] = []
        for _ in range(2):
            for watch in watches:
                watch.counts.clear()
            engine.run(1, progress=False)
            rounds.append(sum((watch.counts for watch in watches), Counter()))
    return Search(
        asked.batch_size,
        asked.rounds,
        asked.levels.architecture.warmup_rounds,
        *rounds,
        {watch.name: watch.copies for watch in watches},
        keeps_graph=keeps_graph(asked),
        labelled=asked.labelled_weight > 0,
        lower=asked.precision != "fp32",
        num_batches=teacher_level.micro_batches + 2 * student_level.micro_batches + 2 * top.micro_batches,
        image=4 * channels * side**2 / 2**20,
    )


def keeps_graph(recipe: LBTRecipe) -> bool:
    """Whether the engine keeps the teacher's graph on the unlabelled images for the student's product."""
    student = recipe.levels.student
    differs = isinstance(student.hypergradient.build(), mlo.FiniteDifference)
    return differs and student.micro_batches == 1 and recipe.precision == "fp32"
