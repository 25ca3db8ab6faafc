"""What of a graph Betty can express: the settings of each level, and everything that it has no place for.

Read off the source of betty-ml 0.2.1. Called by `mlo.interop.betty` before anything is built; needs no Betty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from mlo.graph import Graph
from mlo.hypergradients import SAMA, ConjugateGradient, FiniteDifference, FirstOrder, Hypergradient, Neumann
from mlo.interop.betty_schedule import Dependencies, Schedule, find_dependencies, find_schedule
from mlo.problem import Problem
from mlo.sharding import is_sharded
from mlo.streams import shared_generators

Settings = Mapping[str, str | int | float]
"""Arguments of a `betty.configs.Config`."""


@dataclass(frozen=True)
class Options:
    """The options of an engine, as `mlo.Engine` has them.

    Attributes:
        device: of the modules.
        precision: "fp32", "bf16" or "fp16".
        rollback: put the lower levels back before each upper step.
        diagnostics_every: interval of diagnostics, or None.
    """

    device: torch.device
    precision: str = "fp32"
    rollback: bool = False
    diagnostics_every: int | None = None


@dataclass(frozen=True)
class Obstacle:
    """One thing that Betty cannot express.

    Attributes:
        where: the level, edge or option.
        what: it asks, and what Betty does instead.
        mend: what to change.
    """

    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.mend}."


@dataclass(frozen=True)
class Translation:
    """A graph in Betty's terms.

    Attributes:
        dependencies: between its levels.
        schedule: of a round.
        settings: of each level's `Config`.
        obstacles: all that cannot be expressed; the rest is meaningful where there is none.
    """

    dependencies: Dependencies
    schedule: Schedule
    settings: Mapping[str, Settings]
    obstacles: tuple[Obstacle, ...]


def translate(graph: Graph, options: Options) -> Translation:
    """Put a graph and the options of its engine in Betty's terms, and find all that cannot be."""
    dependencies = find_dependencies(graph)
    schedule = find_schedule(graph, dependencies)
    warmups = {p.name: _warmup(p, dependencies, schedule) for p in graph.levels if p.warmup_rounds}
    warmup_steps = dict(found for found in warmups.values() if found is not None)
    settings: dict[str, Settings] = {}
    obstacles: list[Obstacle] = []
    for problem in graph.levels:
        name = problem.name
        own: dict[str, Any] = {
            "unroll_steps": problem.steps,
            "gradient_accumulation": problem.micro_batches,
            "gradient_clipping": float(problem.clip_norm or 0.0),
            "precision": options.precision,
            "warmup_steps": warmup_steps.get(name, 0),
            "retain_graph": bool(dependencies.lowers[name]),  # its loss is gone back through once more for each path
        }
        obstacles += _of_level(problem, dependencies)
        if name in warmups:
            obstacles += _of_warmup(problem, dependencies, found=warmups[name] is not None)
        if any(name in graph.structure.inside[upper] for upper in graph.structure.names):
            obstacles += _of_response(problem)
            found, hindrances = _estimator(problem, middle=bool(dependencies.lowers[name]))
            own |= found
            obstacles += (Obstacle(f"level {name!r}, {problem.hypergradient!r}", *pair) for pair in hindrances)
        settings[name] = own
    obstacles += _of_edges(dependencies)
    obstacles += _of_data(graph)
    obstacles += _of_schedule(graph, schedule, dependencies)
    obstacles += _of_options(graph, dependencies, options)
    return Translation(dependencies, schedule, settings, tuple(obstacles))


def passes_first_order(graph: Graph, inner: list[str]) -> bool:
    """Whether one of the levels that a path goes back through is to count as constant."""
    return any(isinstance(graph[name].hypergradient, FirstOrder) for name in inner)


# --- levels -----------------------------------------------------------------------------------------------------------


def _of_level(problem: Problem, dependencies: Dependencies) -> Iterator[Obstacle]:
    where = f"level {problem.name!r}"
    if problem.start is not None:
        yield Obstacle(f"{where}, start", "Betty's levels always go on from where they are", "Leave start out")
    if problem.hyperparameters:
        names = ", ".join(problem.hyperparameters)
        yield Obstacle(
            f"{where}, hyperparameters {names}", "Betty reads no option of an optimizer from a level", "Fix the options"
        )
    if is_sharded(problem.module):
        yield Obstacle(f"{where}, module", "it is sharded by fully_shard, which Betty does not know", "Unshard it")
    if problem.micro_batches > 1 and dependencies.children[problem.name]:
        yield Obstacle(
            f"{where}, micro_batches={problem.micro_batches}",
            "Betty takes the steps of the levels below again before each further micro-batch",
            "Set micro_batches=1 and make the batches larger",
        )
    if problem.micro_batches > 1 and problem.scheduler is not None:
        yield Obstacle(
            f"{where}, micro_batches={problem.micro_batches} with a scheduler",
            "Betty advances the scheduler after each micro-batch",
            "Set micro_batches=1, or leave the scheduler out",
        )


def _of_response(problem: Problem) -> Iterator[Obstacle]:
    held = {id(p) for group in problem.optimizer.param_groups for p in group["params"]}
    loose = [name for name, p in problem.module.named_parameters() if p.requires_grad and id(p) not in held]
    if loose and not isinstance(problem.hypergradient, FirstOrder):
        yield Obstacle(
            f"level {problem.name!r}, optimizer",
            f"it does not hold {', '.join(loose)}, which Betty's estimators would take for variables that respond",
            "Give the optimizer all parameters that require a gradient, or set requires_grad=False",
        )


def _of_warmup(problem: Problem, dependencies: Dependencies, *, found: bool) -> Iterator[Obstacle]:
    where, above = f"level {problem.name!r}, warmup_rounds", dependencies.parents[problem.name]
    if not found:
        yield Obstacle(
            where,
            "Betty makes the level above wait by a level that nobody else waits for, and there is none",
            "Leave the warm-up out",
        )
    if above:
        yield Obstacle(
            where,
            f"in Betty the levels that read it ({_names(above)}) wait as long as it does",
            "Leave the warm-up out",
        )


def _warmup(problem: Problem, dependencies: Dependencies, schedule: Schedule) -> tuple[str, int] | None:
    """Find a level whose `warmup_steps` make just this one wait, and how many; None if there is none."""
    sole = [c for c in dependencies.children[problem.name] if dependencies.parents[c] == (problem.name,)]
    return (sole[-1], problem.warmup_rounds * schedule.asked[sole[-1]]) if sole else None


# --- estimators -------------------------------------------------------------------------------------------------------

_Found = tuple[dict[str, Any], list[tuple[str, str]]]


def _estimator(problem: Problem, *, middle: bool) -> _Found:
    """Return the settings of a level's estimator, and pairs (what, mend) of what hinders."""
    translator = _TRANSLATORS.get(type(problem.hypergradient))
    if translator is None:
        return {}, [("Betty has no such estimator", _choose(problem))]
    found, hindrances = translator(problem.hypergradient, problem, middle)
    ascends = any(group.get("maximize") for group in problem.optimizer.param_groups)
    if ascends and isinstance(problem.hypergradient, FiniteDifference | SAMA | Neumann):
        hindrances.append(("Betty differentiates a step downhill", "Negate the loss, and leave maximize out"))
    return found, hindrances


def _finite_difference(estimator: Any, problem: Problem, middle: bool) -> _Found:  # noqa: ARG001
    hindrances = [("Betty takes central differences", "Set one_sided=False")] if estimator.one_sided else []
    if min(estimator.last or problem.steps, problem.steps) > 1:
        what = f"Betty goes back one step, not {estimator.last or 'all'} of {problem.steps}"
        hindrances.append((what, "Set last=1"))
    return {"type": "darts", "darts_alpha": estimator.radius}, hindrances


def _sama(estimator: Any, problem: Problem, middle: bool) -> _Found:  # noqa: ARG001
    found = {"type": "sama", "sama_adam_alpha": estimator.radius}
    kind = type(problem.optimizer).__name__.lower()
    if "rmsprop" in kind:
        return found, [("Betty's SAMA raises NotImplementedError with RMSprop", "Choose SGD or Adam")]
    if "adam" in kind and not all("betas" in group for group in problem.optimizer.param_groups):
        return found, [("Betty takes the optimizer for Adam by its name, and it has no betas", "Choose SGD or Adam")]
    return found, []


def _first_order(estimator: Any, problem: Problem, middle: bool) -> _Found:  # noqa: ARG001
    return {}, []  # the paths that go back through the level are left out


def _neumann(estimator: Any, problem: Problem, middle: bool) -> _Found:
    hindrances = _of_implicit(estimator.warm_start, problem, middle)
    if estimator.scale == "auto":
        return {}, [*hindrances, ("Betty does not find the scale itself", "Give it, as in mlo.Neumann(scale=0.1)")]
    # Betty's series has one term more than its neumann_iterations.
    found = {"type": "neumann", "neumann_iterations": estimator.terms - 1, "neumann_alpha": estimator.scale}
    return found, hindrances


def _conjugate_gradient(estimator: Any, problem: Problem, middle: bool) -> _Found:
    hindrances = _of_implicit(estimator.warm_start, problem, middle)
    if estimator.damping:
        hindrances.append(("Betty has no damping", "Set damping=0, or add the damping as a penalty to the loss"))
    if estimator.preconditioner is not None:
        hindrances.append(("Betty has no preconditioner", "Leave it out"))
    # With another cg_alpha than 1 Betty's iterations do not solve a linear system.
    return {"type": "cg", "cg_iterations": estimator.iterations, "cg_alpha": 1.0}, hindrances


def _of_implicit(warm_start: bool, problem: Problem, middle: bool) -> list[tuple[str, str]]:
    hindrances = []
    if middle:
        hindrances.append(("Betty refuses it for a level with levels solved inside it", _choose(problem)))
    if warm_start:
        hindrances.append(("Betty has no warm start", "Set warm_start=False"))
    return hindrances


def _choose(problem: Problem) -> str:
    return (
        f"Choose mlo.FiniteDifference(), mlo.SAMA() or mlo.FirstOrder(), in a recipe by "
        f"--set levels.{problem.name}.hypergradient.kind=finite_difference"
    )


_TRANSLATORS: Mapping[type[Hypergradient], Callable[[Any, Problem, bool], _Found]] = MappingProxyType(
    {
        FiniteDifference: _finite_difference,
        SAMA: _sama,
        FirstOrder: _first_order,
        Neumann: _neumann,
        ConjugateGradient: _conjugate_gradient,
    }
)


# --- the graph and the engine -----------------------------------------------------------------------------------------


def _of_edges(dependencies: Dependencies) -> Iterator[Obstacle]:
    for source, target in dependencies.lost:
        yield Obstacle(
            f"edge {source!r} -> {target!r}",
            f"Betty knows no response to a higher level except where {source!r} reads {target!r}, directly or through "
            f"levels between them",
            f"List {source!r} before {target!r}, or declare the edge detached",
        )


def _of_data(graph: Graph) -> Iterator[Obstacle]:
    for first, second in shared_generators({problem.name: problem.data for problem in graph.levels}):
        yield Obstacle(
            f"data of levels {first!r} and {second!r}",
            "both draw from one generator, and Betty begins to read them in another order",
            "Give each a torch.Generator of its own, or none",
        )


def _of_schedule(graph: Graph, schedule: Schedule, dependencies: Dependencies) -> Iterator[Obstacle]:
    children, inside = dependencies.children, graph.structure.inside
    if any(problem.micro_batches > 1 and children[problem.name] for problem in graph.levels):
        return  # which is refused, and upsets the schedule
    if schedule.taken != schedule.asked:
        differing = "; ".join(
            f"{schedule.taken[name]} of {name!r} where the graph takes {asked}"
            for name, asked in schedule.asked.items()
            if schedule.taken[name] != asked
        )
        beside = [n for n in schedule.asked if graph[n].steps > 1 and not set(children[n]) <= set(inside[n])]
        lowest = [n for n in schedule.asked if not children[n]]
        yield Obstacle(
            f"steps of {_names(beside or lowest)}",
            f"in a round Betty takes other numbers of steps, {differing}: it steps a level once whenever all that it "
            f"reads from below have taken theirs, and all that read nothing equally often",
            f"Set steps=1 of {_names(beside)}" if beside else f"Give {_names(lowest)} equal steps",
        )
        return
    for source, target in (pair for pair in schedule.disordered if pair not in dependencies.lost):
        yield Obstacle(
            f"edge {source!r} -> {target!r}",
            f"Betty steps {source!r} and {target!r} in another order than the graph",
            "Give both steps=1, or remove the edge",
        )


def _of_options(graph: Graph, dependencies: Dependencies, options: Options) -> Iterator[Obstacle]:
    if options.precision != "fp32" and options.device.type != "cuda":
        yield Obstacle(
            f"precision {options.precision!r} on device {options.device.type!r}",
            "Betty's lower precision is CUDA's",
            "Choose precision fp32, or device cuda",
        )
    if options.diagnostics_every is not None:
        yield Obstacle(
            f"diagnostics_every={options.diagnostics_every}", "Betty records no steps to compare with", "Leave it out"
        )
    if options.rollback:
        yield from _of_rollback(graph, dependencies)


def _of_rollback(graph: Graph, dependencies: Dependencies) -> Iterator[Obstacle]:
    inside, names = graph.structure.inside, graph.structure.names
    lowest = [name for name, children in dependencies.children.items() if not children]
    if len(lowest) > 1:
        yield Obstacle(
            f"rollback with levels {_names(lowest)}",
            "where several levels read nothing from below, Betty steps the level above before all of them have stepped",
            "Set rollback=False",
        )
    for problem in graph.levels:
        where = f"rollback, level {problem.name!r}"
        if dependencies.parents[problem.name] and problem.steps * problem.micro_batches > 1:
            yield Obstacle(
                f"{where} with {problem.steps} steps of {problem.micro_batches} micro-batches",
                "after a rollback Betty takes one step again, on the last batch alone",
                "Set steps=1 and micro_batches=1, or rollback=False",
            )
        if problem.warmup_rounds:
            yield Obstacle(
                f"{where} with warmup_rounds={problem.warmup_rounds}",
                "the first rollback of Betty undoes all of the warm-up",
                "Leave the warm-up out, or set rollback=False",
            )
        above = [n for n in names[names.index(problem.name) + 1 :] if problem.name not in inside[n]]
        together = {n for n in above if any({n, problem.name} <= set(i) for i in inside.values())}
        for other in above:
            if other not in together and other in dependencies.parents[problem.name]:
                yield Obstacle(
                    f"{where}, which {other!r} reads without being solved around it",
                    f"Betty steps {other!r} before it puts {problem.name!r} back",
                    "Set rollback=False",
                )
            if other in together and other in graph.reads(problem.name):
                yield Obstacle(
                    f"{where}, which reads {other!r} without being solved in it",
                    f"Betty steps {problem.name!r} again before it puts {other!r} back",
                    "Set rollback=False",
                )
        if any(inside[inner] for inner in inside[problem.name]):
            yield Obstacle(
                f"{where}, with levels solved inside levels inside it",
                "Betty rolls back once, after the highest level's step",
                "Set rollback=False",
            )


def _names(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
