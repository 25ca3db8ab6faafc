"""Whether losses read what their edges declare, found by calling each once before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from mlo.autodiff import Backend, Level
from mlo.errors import GraphError
from mlo.graph import Graph
from mlo.state import LevelState


def trace(
    graph: Graph,
    levels: Mapping[str, Level],
    states: Mapping[str, LevelState],
    progress: float,
    backend: Backend,
) -> None:
    """Call each loss once, changing nothing, and compare what it reads with the edges.

    Raises:
        GraphError: a loss reads a level without an edge, does not read one that it has an edge to, or depends on none.
    """
    for name, state in states.items():
        accessed: set[str] = set()
        with state.stream.rewound(), ExitStack() as stack:
            for level in levels.values():
                stack.enter_context(level.buffers.watched())
                stack.enter_context(level.buffers.held())
            call = state.next_call(levels, progress, backend, recorded=False)
            call.hyperparameters({}, accessed=accessed)
            loss = call.parts[0].evaluate(autocast=True, accessed=accessed).loss
            graph.check_reads(name, sorted(accessed))
            if not loss.requires_grad:
                raise GraphError(
                    f"the loss of level {name!r}: expected a tensor that depends on variables of {name!r} or of a "
                    f"level that it reads; found one without a gradient. Take no_grad(), detach() or item() out of "
                    f"the loss."
                )
            _check_closure(levels, name, loss)


def _check_closure(levels: Mapping[str, Level], name: str, loss: Tensor) -> None:
    """Refuse a loss that depends on a level that it did not read through `levels`."""
    for other in levels.values():
        if other.name == name or other.name in levels[name].reads:
            continue
        found = torch.autograd.grad(loss, other.variables.parameters, retain_graph=True, allow_unused=True)
        if any(g is not None for g in found):
            raise GraphError(
                f"the loss of level {name!r} depends on the variables of level {other.name!r} without an edge: it "
                f"uses the module itself. Declare mlo.Edge({other.name!r}, {name!r}) and read levels.{other.name}."
            )
