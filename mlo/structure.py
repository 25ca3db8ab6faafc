"""Who is solved inside whom: the order that a set of levels and read edges implies.

Pure graph arithmetic on names, used by the graph's checks, by the schedule and by the reverse sweep. Levels are listed
from lowest to highest. An edge (source, target) says that the target's loss reads the source's variables; detached
edges are read by value only and must be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence


class Structure:
    """The solve and sweep order of levels.

    Attributes:
        names: the levels, lowest first.
        reads: for each level the levels that its loss reads and differentiates, lowest first, itself excluded.
        inside: E(p), the levels solved inside p, lowest first: the rest of p's strongly connected component in the read
            graph restricted to levels up to p.
        responds_to: what p's best response is a function of: all that p and E(p) read outside themselves.
        members: the levels of E(p) that are not inside another member of it, lowest first.
        sweep_order: E(p), each level before those that it responds to.
        replay_order: the members of p, each after those that it responds to.
        tops: the levels inside no other, lowest first.
        nested: the levels inside one that is itself inside another.
    """

    def __init__(self, names: Sequence[str], edges: Iterable[tuple[str, str]]) -> None:
        self.names = tuple(names)
        rank = {name: index for index, name in enumerate(self.names)}
        pairs = set(edges)
        self.reads: Mapping[str, tuple[str, ...]] = {
            name: tuple(source for source in self.names if (source, name) in pairs and source != name)
            for name in self.names
        }
        self.inside: Mapping[str, tuple[str, ...]] = {
            name: self._component(self.names[: rank[name] + 1], name) for name in self.names
        }
        self.responds_to: Mapping[str, tuple[str, ...]] = {name: self._responds_to(name) for name in self.names}
        self.members: Mapping[str, tuple[str, ...]] = {name: self._outermost(self.inside[name]) for name in self.names}
        self.sweep_order: Mapping[str, tuple[str, ...]] = {name: self._sweep_order(name) for name in self.names}
        self.replay_order: Mapping[str, tuple[str, ...]] = {name: self._replay_order(name) for name in self.names}
        self.tops = self._outermost(self.names)
        self.nested = {q for inside in self.inside.values() for p in inside for q in self.inside[p]}

    def _component(self, names: Sequence[str], name: str) -> tuple[str, ...]:
        allowed = set(names)
        forward = {target: {s for s in self.reads[target] if s in allowed} for target in names}
        backward: dict[str, set[str]] = {source: set() for source in names}
        for target, sources in forward.items():
            for source in sources:
                backward[source].add(target)
        component = reachable(forward, name) & reachable(backward, name)
        return tuple(other for other in names if other in component and other != name)

    def _responds_to(self, name: str) -> tuple[str, ...]:
        own = {name, *self.inside[name]}
        read = {source for level in own for source in self.reads[level]}
        return tuple(other for other in self.names if other in read - own)

    def _outermost(self, names: Sequence[str]) -> tuple[str, ...]:
        nested = {inner for name in names for inner in self.inside[name]}
        return tuple(name for name in names if name not in nested)

    def _sweep_order(self, name: str) -> tuple[str, ...]:
        def blocked(level: str, waiting: Sequence[str]) -> bool:
            return any(level in self.responds_to[other] for other in waiting)

        return _sorted(self.inside[name][::-1], blocked)  # the highest of the free levels first: one order of many

    def _replay_order(self, name: str) -> tuple[str, ...]:
        def blocked(level: str, waiting: Sequence[str]) -> bool:
            return any({o, *self.inside[o]} & set(self.responds_to[level]) for o in waiting if o != level)

        return _sorted(self.members[name], blocked)


def _sorted(names: Sequence[str], blocked: Callable[[str, Sequence[str]], bool]) -> tuple[str, ...]:
    """Sort topologically; of the names that no waiting one blocks, the first comes first."""
    waiting, order = list(names), []
    while waiting:
        free = next(name for name in waiting if not blocked(name, waiting))
        order.append(free)
        waiting.remove(free)
    return tuple(order)


def reachable(successors: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """Return all nodes that can be reached from `start`, itself included."""
    found, frontier = {start}, [start]
    while frontier:
        for node in successors[frontier.pop()]:
            if node not in found:
                found.add(node)
                frontier.append(node)
    return found
