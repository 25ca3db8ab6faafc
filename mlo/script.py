"""What is the same whenever a solve is played again: the part of `Engine.check` that holds still what must not move.

The hypergradient counts as constant the batches, random draws and buffers of every loss call, the start (weights,
optimizer state) of every solve, also within a nest, and what is read through detached edges. A black box that let any
of them move would measure something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlo.arithmetic import Gradient, Tensors
from mlo.autodiff import Call
from mlo.optimizers import Update
from mlo.problem import Problem
from mlo.sweep import World


class Script:
    """One solve and the evaluation after it: written down when first played, and the same whenever played again.

    Args:
        observed: the levels whose gradients are kept, to see whether they converge.
    """

    def __init__(self, observed: Sequence[str] = ()) -> None:
        self.repeating = False
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in observed}
        self._starts: list[list[Callable[[], None]]] = []
        self._calls: list[Call] = []
        self._buffers: list[list[tuple[dict[str, Tensor | None], str, Tensor]]] = []
        self._position = [0, 0]  # solves and calls played

    def rewind(self) -> None:
        """Repeat what is written, from its beginning."""
        self.repeating, self._position = True, [0, 0]
        self.gradients = {name: [] for name in self.gradients}

    def begin_solve(self, snapshots: Sequence[Callable[[], Callable[[], None]]]) -> None:
        """Write down where the levels inside a solve stand, or put them back there.

        Args:
            snapshots: of the levels, see `LevelState.snapshot`.
        """
        if self.repeating:
            for restore in self._starts[self._position[0]]:
                restore()
            self._position[0] += 1
        else:
            self._starts.append([snapshot() for snapshot in snapshots])

    def record(self, call: Call, world: World) -> None:
        """Write down a loss call: its buffers, and the values that it reads through detached edges."""
        level = call.levels[call.level]
        constants = {
            q: tuple(t.detach().clone() for t in world[q].tensors) for q in level.reads if q not in level.attached
        }
        modules = [call.levels[name].module for name in (level.name, *level.reads)]
        parts = [part for module in modules for part in module.modules()]
        self._buffers.append(
            [(p._buffers, k, b.clone()) for p in parts for k, b in p._buffers.items() if b is not None]
        )
        self._calls.append(call.holding(constants))

    def next_call(self) -> Call:
        """Return the next loss call as it was written down, with the buffers as they were."""
        for container, key, buffer in self._buffers[self._position[1]]:
            container[key] = buffer.clone()
        self._position[1] += 1
        return self._calls[self._position[1] - 1]

    def observe(self, problem: Problem, variables: Tensors, gradient: Gradient) -> None:
        """Keep the gradient of a level's objective, its optimizer's coupled weight decay included."""
        if problem.name in self.gradients:
            update = Update.capture(problem.optimizer, variables, gradient, None)
            found = update.total_gradient(tuple(v.detach() for v in variables), gradient)
            pieces = [g.reshape(-1) for g in found if g is not None]
            self.gradients[problem.name].append(torch.cat(pieces) if pieces else torch.zeros(1))
