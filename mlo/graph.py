"""The graph of levels: declaration, and every check that can be made before the first step."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import combinations

import torch
from torch.optim import LBFGS

from mlo.errors import GraphError, MloError
from mlo.optimizers import coupled_weight_decay, has_update_rule, registered_optimizers
from mlo.problem import Problem
from mlo.sharding import check_shards, is_sharded
from mlo.structure import Structure, reachable


@dataclass(frozen=True)
class Edge:
    """The target's loss reads the source's variables.

    Args:
        source: name of the level that is read.
        target: name of the level that reads.
        detached: read by value only; the edge is not differentiated and solves no level inside another.
    """

    source: str
    target: str
    _: KW_ONLY
    detached: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.detached, bool):
            raise GraphError(
                f"edge {self.source!r} -> {self.target!r}: detached must be True or False; found {self.detached!r}"
            )


class Graph:
    """Levels from lowest to highest, and what each reads.

    Args:
        levels: the problems; their order says who is solved before whom.
        edges: who reads whom.

    Attributes:
        levels: as given.
        edges: as given.
        structure: who is solved inside whom, and the order of the sweep.

    Raises:
        GraphError: a mistake in the declaration; the message names the level, what was expected, what was found, the
            mend.
    """

    def __init__(self, levels: Iterable[Problem], edges: Iterable[Edge] = ()) -> None:
        for what, given in (("levels", levels), ("edges", edges)):
            if not isinstance(given, Iterable):
                raise GraphError(
                    f"{what}: expected a list; found one {type(given).__name__}. Put it into brackets: [...]."
                )
        self.levels = tuple(levels)
        self.edges = tuple(edges)
        self._check_levels()
        self._by_name = {problem.name: problem for problem in self.levels}
        self._check_edges()
        attached = [(e.source, e.target) for e in self.edges if not e.detached]
        self.structure = Structure([p.name for p in self.levels], attached)
        self._check_influence()
        self._check_parameters()
        self._check_starts()
        self._check_warmups()
        self._check_estimators()
        self._check_sharded()

    def __getitem__(self, name: str) -> Problem:
        if name not in self._by_name:
            self.check_name(name, "level")
        return self._by_name[name]

    def inside(self, name: str) -> frozenset[str]:
        """Return E(name): the levels that are solved inside `name`."""
        self.check_name(name, "level")
        return frozenset(self.structure.inside[name])

    def reads(self, name: str) -> tuple[str, ...]:
        """Return all levels that `name` may read, detached ones included, lowest first."""
        sources = {edge.source for edge in self.edges if edge.target == name}
        return tuple(problem.name for problem in self.levels if problem.name in sources)

    def check_name(self, name: str, where: str) -> None:
        """Refuse a name that is not a level's.

        Raises:
            GraphError: with the nearest name.
        """
        names = [problem.name for problem in self.levels]
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise GraphError(f"{where}: expected one of the levels {', '.join(names)}; found {name!r}.{hint}")

    def check_reads(self, name: str, accessed: Sequence[str]) -> None:
        """Refuse edges that the loss of `name` does not use, given what one call of it read.

        Raises:
            GraphError: naming the unused edge.
        """
        for source in self.reads(name):
            if source not in accessed and source != self[name].start:
                raise GraphError(
                    f"edge {source!r} -> {name!r}: expected the loss of {name!r} to read levels.{source}; one call of "
                    f"it read {', '.join(sorted(accessed)) or 'nothing'}. Remove the edge, or read the level."
                )

    def _check_levels(self) -> None:
        if not self.levels:
            raise GraphError("a graph needs at least one level; found none")
        for problem in self.levels:
            if not isinstance(problem, Problem):
                raise GraphError(f"levels: expected mlo.Problem objects; found {problem!r}")
        names = [problem.name for problem in self.levels]
        for name in names:
            if names.count(name) > 1:
                raise GraphError(
                    f"level {name!r}: expected names to differ; found it {names.count(name)} times. Rename one."
                )

    def _check_edges(self) -> None:
        seen: set[tuple[str, str]] = set()
        for edge in self.edges:
            if not isinstance(edge, Edge):
                raise GraphError(f"edges: expected mlo.Edge objects; found {edge!r}")
            self.check_name(edge.source, f"source of {edge}")
            self.check_name(edge.target, f"target of {edge}")
            if edge.source == edge.target:
                raise GraphError(
                    f"{edge}: a loss always reads its own level's variables; found an edge from {edge.source!r} to "
                    f"itself. Remove it."
                )
            if (edge.source, edge.target) in seen:
                raise GraphError(
                    f"edge {edge.source!r} -> {edge.target!r}: expected it once; found it twice. Remove one of the two."
                )
            seen.add((edge.source, edge.target))

    def _check_types(self, problem: Problem) -> None:
        types = {name: p.dtype for name, p in problem.module.named_parameters() if p.requires_grad}
        for name, dtype in types.items():
            if dtype.is_complex:
                raise GraphError(
                    f"level {problem.name!r}: expected real parameters; found {name}, of {dtype}. Keep the real and "
                    f"imaginary parts, and let the module take torch.view_as_complex of them."
                )
        estimator = problem.hypergradient
        differs = not estimator.needs_second_derivatives and estimator.recorded_steps != 0
        coarse = sorted({str(dtype) for dtype in types.values() if dtype in (torch.bfloat16, torch.float16)})
        if differs and coarse and any(problem.name in inner for inner in self.structure.inside.values()):
            warnings.warn(
                f"level {problem.name!r}, {type(estimator).__name__}: expected parameters in torch.float32 or wider, "
                f"as it takes differences of small moves of them; found {', '.join(coarse)}, in which such moves are "
                f"mostly rounded away. Keep them in float32 and choose precision='bf16' or 'fp16'.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check_influence(self) -> None:
        names = [problem.name for problem in self.levels]
        successors = {name: [edge.target for edge in self.edges if edge.source == name] for name in names}
        for index, name in enumerate(names[:-1]):
            above = names[index + 1 :]
            if not reachable(successors, name) & set(above):
                raise GraphError(
                    f"level {name!r}: expected it to influence a level above it ({', '.join(above)}), directly or "
                    f"through others; found no path of edges. Add mlo.Edge({name!r}, ...) to the level whose loss "
                    f"reads it, or remove it."
                )

    def _check_parameters(self) -> None:
        for problem in self.levels:
            check_shards(problem.name, problem.module)
            self._check_types(problem)
        owned = {p.name: {id(w): n for n, w in p.module.named_parameters() if w.requires_grad} for p in self.levels}
        for name, own in owned.items():
            if not own:
                raise GraphError(
                    f"level {name!r}: expected a module with parameters that require a gradient; found none. Set "
                    f"requires_grad=True on what is to be trained."
                )
        for a, b in combinations(self.levels, 2):
            shared = [n for i, n in owned[a.name].items() if i in owned[b.name]]
            if shared:
                raise GraphError(
                    f"levels {a.name!r} and {b.name!r}: expected each parameter in one level; found {shared[0]!r} of "
                    f"{a.name!r} in both. Let one level read the other through an edge instead of sharing the module."
                )
        for problem in self.levels:
            self._check_optimizer(problem, owned[problem.name])

    def _check_optimizer(self, problem: Problem, owned: dict[int, str]) -> None:
        where = f"level {problem.name!r}, optimizer {type(problem.optimizer).__name__}"
        if isinstance(problem.optimizer, LBFGS):
            raise GraphError(
                f"{where}: expected an optimizer that steps without a closure; found LBFGS. Choose SGD or Adam."
            )
        if any(group.get("differentiable") for group in problem.optimizer.param_groups):
            raise GraphError(
                f"{where}: expected differentiable=False; found True. Leave it out: an estimator such as mlo.Unroll() "
                f"differentiates steps by rules of its own."
            )
        members = {id(p) for p in problem.module.parameters()}
        held = [p for group in problem.optimizer.param_groups for p in group["params"]]
        foreign = [p for p in held if id(p) not in members]
        if foreign:
            raise GraphError(
                f"{where}: expected parameters of the level's own module; found {len(foreign)} foreign ones (the first "
                f"has shape {tuple(foreign[0].shape)}). Build it over module.parameters()."
            )
        if not any(id(p) in owned for p in held):
            raise GraphError(f"{where}: expected it to hold the level's trainable parameters; found none of them.")

    def _check_starts(self) -> None:
        for problem in self.levels:
            if problem.start is None:
                continue
            where = f"level {problem.name!r}, start"
            self.check_name(problem.start, where)
            if problem.start == problem.name:
                raise GraphError(f"{where}: expected another level; found itself. A level goes on from itself anyway.")
            if problem.start not in self.structure.reads[problem.name]:
                kind = "a detached one" if problem.start in self.reads(problem.name) else "none"
                raise GraphError(
                    f"{where}: expected an edge from {problem.start!r}, whose variables it begins at; found {kind}. "
                    f"Declare mlo.Edge({problem.start!r}, {problem.name!r})."
                )
            if is_sharded(problem.module) != is_sharded(self[problem.start].module):
                raise GraphError(f"{where}: expected both levels sharded, or none; found one of them")
            here, there = (
                {n: (tuple(p.shape), p.dtype) for n, p in level.module.named_parameters() if p.requires_grad}
                for level in (problem, self[problem.start])
            )
            for name in (*here, *there):
                found = [_parameter(own.get(name)) for own in (here, there)]
                if found[0] != found[1] or list(here) != list(there):
                    what = (
                        f"{name} {found[0]} here and {found[1]} there"
                        if found[0] != found[1]
                        else f"the order {', '.join(here)} here and {', '.join(there)} there"
                    )
                    raise GraphError(
                        f"{where}: expected the same trainable parameters, in the same order, as level "
                        f"{problem.start!r}; found {what}. Build both from one module class."
                    )

    def _check_warmups(self) -> None:
        for problem in self.levels:
            if problem.warmup_rounds and problem.name not in self.structure.tops:
                uppers = [p.name for p in self.levels if problem.name in self.structure.inside[p.name]]
                raise GraphError(
                    f"level {problem.name!r}, warmup_rounds: expected a level that is solved inside no other; found "
                    f"one inside {', '.join(uppers)}. Warm up {uppers[-1]!r} instead, or leave it out."
                )

    def _check_estimators(self) -> None:
        for problem in self.levels:
            uppers = [p for p in self.levels if problem.name in self.structure.inside[p.name]]
            nested = [p for p in uppers if any(p.name in self.structure.inside[q.name] for q in self.levels)]
            repeated = any(p.hypergradient.recorded_steps != 0 for p in nested)
            implicit = problem.hypergradient.implicit
            needs = bool(uppers) and (problem.hypergradient.needs_update_rule or (repeated and not implicit))
            if needs and not has_update_rule(problem.optimizer):
                kind = type(problem.optimizer).__name__
                found = f"{kind} with hooks" if kind in registered_optimizers() else kind
                raise GraphError(
                    f"level {problem.name!r}: {problem.hypergradient!r} differentiates the optimizer's steps; expected "
                    f"one of {', '.join(registered_optimizers())} without hooks on its step; found {found}. Change "
                    f"the optimizer, teach its update with mlo.register_optimizer, or choose an estimator that does "
                    f"not need it."
                )
            if uppers and implicit:
                determined = {"weight_decay": 1.0} if "weight_decay" in problem.hyperparameters else {}
                for group in problem.optimizer.param_groups:
                    try:
                        coupled_weight_decay(type(problem.optimizer), {**group, **determined})
                    except MloError as error:
                        raise GraphError(f"level {problem.name!r}, {problem.hypergradient!r}: {error}") from error

    def _check_sharded(self) -> None:
        sharded = [problem for problem in self.levels if is_sharded(problem.module)]
        for problem in sharded:
            for option, value in (("clip_norm", problem.clip_norm), ("hyperparameters", problem.hyperparameters)):
                if value:
                    raise GraphError(
                        f"level {problem.name!r}, {option}: expected none, as the level is sharded; found {value!r}. "
                        f"Remove it, or leave the level unsharded."
                    )
        for problem in self.levels if sharded else ():
            if problem.name not in self.structure.tops and problem.hypergradient.needs_second_derivatives:
                raise GraphError(
                    f"level {problem.name!r}: expected an estimator of first derivatives, as level "
                    f"{sharded[0].name!r} is sharded; found {problem.hypergradient!r}. Choose mlo.Penalty(), "
                    f"mlo.FiniteDifference(), mlo.SAMA() or mlo.FirstOrder()."
                )


def _parameter(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if found is None else f"of shape {found[0]} in {str(found[1]).removeprefix('torch.')}"
