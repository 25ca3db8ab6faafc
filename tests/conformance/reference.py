"""An independent reference for hypergradients: a few lines of plain autograd, sharing no code with the package.

It follows the definition literally. A level's objective is its loss after a differentiable solve of the levels inside
it, each solve from constant start states; the hypergradient is the derivative of that objective. Slow, memory hungry,
and easy to read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Values = dict[str, list[Tensor]]


@dataclass
class ReferenceLevel:
    name: str
    loss: Callable[[Values, Any], Tensor]
    batches: Sequence[Any]
    optimizer: dict[str, Any]  # kind, lr, ...
    steps: int = 1
    clip_norm: float | None = None


def step_sgd(w, g, state, o):
    g = g + o.get("weight_decay", 0.0) * w
    if o.get("momentum", 0.0):
        buf = g if "buf" not in state else o["momentum"] * state["buf"] + (1 - o.get("dampening", 0.0)) * g
        d = g + o["momentum"] * buf if o.get("nesterov") else buf
        return w - o["lr"] * d, {"buf": buf}
    return w - o["lr"] * g, {}


def step_adam(w, g, state, o):
    b1, b2 = o.get("betas", (0.9, 0.999))
    if o["kind"] == "adamw":
        w = w - o["lr"] * o["weight_decay"] * w
    else:
        g = g + o.get("weight_decay", 0.0) * w
    t = state.get("t", 0) + 1
    m = b1 * state.get("m", torch.zeros_like(w)) + (1 - b1) * g
    v = b2 * state.get("v", torch.zeros_like(w)) + (1 - b2) * g**2
    return w - o["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + o.get("eps", 1e-8)), {"t": t, "m": m, "v": v}


@dataclass
class Reference:
    levels: list[ReferenceLevel]
    reads: Mapping[str, set[str]]
    drawn: dict[str, int] = field(default_factory=dict)  # batches served before
    states: dict[str, list[dict]] = field(default_factory=dict)  # optimizer states before
    starts: dict[tuple, tuple[Values, dict, dict]] = field(
        default_factory=dict
    )  # frozen starts, by position in the program

    def __post_init__(self):
        self.by_name = {level.name: level for level in self.levels}
        self.names = [level.name for level in self.levels]

    def inside(self, name):
        """E(name), by closing the read relation transitively on the levels up to `name`."""
        allowed = self.names[: self.names.index(name) + 1]
        reach = {(s, t) for t in allowed for s in self.reads[t] if s in allowed}
        for _ in allowed:
            reach |= {(a, d) for a, b in reach for c, d in reach if b == c}
        return [q for q in allowed if q != name and (q, name) in reach and (name, q) in reach]

    def members(self, name):
        inner = self.inside(name)
        return [q for q in inner if not any(q in self.inside(r) for r in inner)]

    def objective(self, name, values, counts, states, path):
        """F_name at `values`, as a differentiable function, and the values after the solve."""
        values, counts, states = self.solve(name, values, counts, states, path)
        level = self.by_name[name]
        return level.loss(values, level.batches[counts[name] % len(level.batches)]), values, counts, states

    def solve(self, name, values, counts, states, path):
        inner = self.inside(name)
        if not inner:
            return values, counts, states
        if path not in self.starts:
            self.starts[path] = (
                {q: [t.detach() for t in values[q]] for q in inner},
                {q: counts[q] for q in inner},
                {q: detach(states[q]) for q in inner},
            )
        start_values, start_counts, start_states = self.starts[path]
        values, counts, states = values | start_values, counts | start_counts, states | start_states
        for q in self.members(name):
            for k in range(self.by_name[q].steps):
                values, counts, states = self.step(q, values, counts, states, (*path, q, k))
            values, counts, states = self.solve(q, values, counts, states, (*path, q, "last"))
        return values, counts, states

    def step(self, name, values, counts, states, path):
        level = self.by_name[name]
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in values[name]]
        with torch.enable_grad():
            f, after, counts, states = self.objective(name, values | {name: own}, counts, states, path)
            gradient = torch.autograd.grad(f, own, create_graph=True, allow_unused=True)
        gradient = [torch.zeros_like(w) if g is None else g for g, w in zip(gradient, own, strict=True)]
        if level.clip_norm is not None:
            length = sum(g.square().sum() for g in gradient).sqrt()
            gradient = [g * min(1.0, level.clip_norm / (length + 1e-6)) for g in gradient]
        rule = step_sgd if level.optimizer["kind"] == "sgd" else step_adam
        new, new_states = [], []
        for w, g, s in zip(values[name], gradient, states[name], strict=True):
            w2, s2 = rule(w, g, s, level.optimizer)
            new.append(w2)
            new_states.append(s2)
        return after | {name: new}, counts | {name: counts[name] + 1}, states | {name: new_states}

    def total(self, name: str, values: Values) -> Tensor:
        """F_name, differentiable in values[name]; the first call fixes the starts of all solves in it."""
        return self.objective(name, values, dict(self.drawn), dict(self.states), (name,))[0]

    def hypergradient(self, name: str, values: Values) -> list[Tensor]:
        own = [t.detach().requires_grad_() for t in values[name]]
        found = torch.autograd.grad(self.total(name, values | {name: own}), own, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, own, strict=True)]


def detach(states):
    return [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
