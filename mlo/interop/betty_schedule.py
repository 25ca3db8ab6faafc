"""Which levels Betty steps, and when: its dependencies, and its schedule played on names alone.

In Betty a level is stepped once each time all levels that it reads from below have finished their `unroll_steps`; there
is no round, and no order but that. Here a graph's edges become such dependencies, and the steps that Betty would take
are compared with those of a round. Called by `mlo.interop.betty_translation`; needs no Betty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from mlo.graph import Graph
from mlo.structure import reachable


@dataclass(frozen=True)
class Dependencies:
    """The edges of a graph as Betty knows them.

    Attributes:
        parents: Betty's `l2u`: for each level the higher ones that read and differentiate it, lowest first.
        lowers: Betty's `u2l`: for each level the lower ones whose response it differentiates through.
        lost: downward edges (source, target) of levels solved inside a common one, which Betty has no place for.
    """

    parents: Mapping[str, tuple[str, ...]]
    lowers: Mapping[str, tuple[str, ...]]
    lost: tuple[tuple[str, str], ...]

    @property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """For each level those that it waits for."""
        return {name: tuple(c for c, ups in self.parents.items() if name in ups) for name in self.parents}


def find_dependencies(graph: Graph) -> Dependencies:
    """Sort the edges of a graph into Betty's two kinds; detached ones need neither."""
    structure = graph.structure
    names = structure.names
    rank = {name: index for index, name in enumerate(names)}
    parents = {
        name: tuple(other for other in names[rank[name] + 1 :] if name in structure.reads[other]) for name in names
    }
    downward = [(s, t) for t in names for s in structure.reads[t] if rank[s] > rank[t]]
    lowers = {name: tuple(t for s, t in downward if s == name and s in reachable(parents, t)) for name in names}
    lost = tuple(
        (s, t)
        for s, t in downward
        if t not in lowers[s] and (t in structure.inside[s] or any({s, t} <= set(structure.inside[u]) for u in names))
    )
    return Dependencies(parents, lowers, lost)


@dataclass(frozen=True)
class Schedule:
    """What Betty would do in a round.

    Attributes:
        iterations: of Betty's engine, each one step of the levels that wait for nobody.
        taken: steps of each level, micro-batches counted singly.
        asked: the same of the graph's round.
        disordered: edges whose two levels Betty steps in another order.
    """

    iterations: int
    taken: Mapping[str, int]
    asked: Mapping[str, int]
    disordered: tuple[tuple[str, str], ...]

    @property
    def agrees(self) -> bool:
        """Whether Betty takes the steps of the graph's round."""
        return self.taken == self.asked and not self.disordered


def find_schedule(graph: Graph, dependencies: Dependencies) -> Schedule:
    """Play Betty's engine until the steps of one round are taken, or until it is clear that they will not be."""
    names = graph.structure.names
    asked = _round(graph, graph.structure.tops)
    goal = Counter(asked)
    periods = {p.name: p.steps * p.micro_batches for p in graph.levels}
    taken: list[str] = []
    iterations = 0
    found: Counter[str] = Counter()
    for steps in islice(_betty_steps(dependencies, periods), len(asked) * max(periods.values())):
        taken += steps
        found.update(steps)
        iterations += 1
        if found == goal or (found[names[-1]] >= goal[names[-1]] and found.total() > goal.total()):
            break
    pairs = [(edge.source, edge.target) for edge in graph.edges]
    disordered = tuple(pair for pair in pairs if _only(taken, pair) != _only(asked, pair))
    return Schedule(iterations, {n: found[n] for n in names}, {n: goal[n] for n in names}, disordered)


def _round(graph: Graph, names: Sequence[str]) -> list[str]:
    """The steps of a round of our engine, without the solve that follows a nested level's last step."""
    steps: list[str] = []
    for name in names:
        for _ in range(graph[name].steps):
            steps += _round(graph, graph.structure.members[name])
            steps += [name] * graph[name].micro_batches
    return steps


def _betty_steps(dependencies: Dependencies, periods: Mapping[str, int]) -> Iterator[list[str]]:
    """The steps that each iteration of Betty's engine takes (`Problem.step_normal` in its source)."""
    children, parents = dependencies.children, dependencies.parents
    waiting = {name: set(children[name]) for name in parents}
    counts = dict.fromkeys(parents, 0)

    def step(name: str) -> Iterator[str]:
        if waiting[name]:
            return
        counts[name] += 1
        yield name
        if counts[name] % periods[name] == 0:
            for parent in parents[name]:
                waiting[parent].discard(name)
                yield from step(parent)
        waiting[name] = set(children[name])

    leaves = [name for name in parents if not children[name]]
    while True:
        yield [taken for leaf in leaves for taken in step(leaf)]


def _only(steps: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in steps if name in names]
