"""Whether losses read what their edges declare, found by calling each once before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mlo.autodiff import Backend, Level, LossCall, aliases
from mlo.calls import Calls
from mlo.double_backward import nodes_of
from mlo.errors import GraphError
from mlo.graph import Graph
from mlo.hypergradients import Hypergradient
from mlo.levels import Undo
from mlo.sharding import refuse_reads
from mlo.state import LevelState
from mlo.trees import tensors_in


def trace(
    graph: Graph,
    levels: Mapping[str, Level],
    states: Mapping[str, LevelState],
    progress: float,
    backend: Backend,
) -> None:
    """Call each loss once, changing nothing, and compare what it reads with the edges.

    Raises:
        GraphError: a loss reads a level without an edge, does not read one that it has an edge to, depends on none, or
            writes into variables.
    """
    variables = {name: level.variables.parameters for name, level in levels.items()}
    with Undo() as undo:
        for level in levels.values():
            level.buffers.watch(undo)
            level.buffers.hold(undo, moving=True)
            level.variables.bind(level.variables.tensors, undo)  # sharded ones are gathered anew by it
        for name, state in states.items():
            accessed: set[str] = set()
            with state.stream.rewound():
                call = state.next_call(levels, progress, backend, recorded=False)
                for option in call.hyperparameters({}, create_graph=True, accessed=accessed).values():
                    if option.requires_grad:  # what it may read is bound by value here
                        _check_closure(variables, name, option.sum(), "hyperparameters", ())
                _check_outside(graph, name, accessed)
                level = levels[name]
                for other in level.names:
                    levels[other].variables.reshard()  # as they are when a loss is evaluated
                before = {other: _versions(variables[other]) for other in level.names}
                content = tensors_in([part.batch for part in call.parts])
                written = _versions(content)
                below = name not in graph.structure.tops
                loss = _try_out(call.parts[0], graph[name].hypergradient if below else None, backend, accessed)
            for other, versions in before.items():
                if versions != _versions(variables[other]) and not levels[other].variables.sharded:
                    raise GraphError(
                        f"the loss of level {name!r}: expected one that changes no variables; found that it writes "
                        f"into those of {other!r}. Leave that to the level's optimizer."
                    )
            if written != _versions(content):
                raise GraphError(
                    f"the loss of level {name!r}: expected one that leaves its batch as it is, which it is given again "
                    f"for each derivative; found that it writes into it. Take a copy: batch.clone()."
                )
            if any(levels[other].variables.sharded for other in level.names):
                refuse_reads(nodes_of([loss]))
            elif any(node.name() == "CheckpointFunctionBackward" for node in nodes_of([loss])):
                raise GraphError(
                    f"the loss of level {name!r}: expected gradients that torch.autograd.grad can take; found a call "
                    f"of torch.utils.checkpoint with use_reentrant=True, which leaves out those of the parameters "
                    f"inside. Pass use_reentrant=False."
                )
            check_loss(graph, name, loss, accessed, variables)
            del loss  # and its graph, before the next one is made


def check_loss(
    graph: Graph, name: str, loss: Tensor, accessed: Collection[str], variables: Mapping[str, Sequence[Tensor]]
) -> None:
    """Compare one value of a level's loss with the edges.

    Args:
        graph: that the level belongs to.
        name: of the level.
        loss: the value, with its graph.
        accessed: names of the levels that it was computed from.
        variables: of all levels.

    Raises:
        GraphError: as `trace`.
    """
    graph.check_reads(name, sorted(accessed))
    if not loss.requires_grad:
        raise GraphError(
            f"the loss of level {name!r}: expected a tensor that depends on variables of {name!r} or of a level that "
            f"it reads; found one without a gradient. Take no_grad(), detach() or item() out of the loss."
        )
    _check_closure(variables, name, loss, "loss", (name, *graph.reads(name)))


def _try_out(call: LossCall, estimator: Hypergradient | None, backend: Backend, accessed: set[str]) -> Tensor:
    """Evaluate a loss for the first time, and find out what of its level's steps can be kept.

    Args:
        call: of the loss.
        estimator: of the level; None if it is not differentiated.
        backend: of the engine.
        accessed: receives the names of the levels that were read.
    """
    level, names = call.levels[call.level], call.levels[call.level].names
    if estimator is None or any(call.levels[q].variables.sharded for q in names):
        return call.evaluate(autocast=True, accessed=accessed).loss
    habits, own = level.habits, level.variables.tensors
    with Undo() as undo:
        if estimator.kept_graphs != 0 or estimator.keeps_partials:
            own = aliases(own, create_graph=False)
            level.variables.bind(own, undo)
        marking = estimator.keeps_partials
        record = Calls(backend.device, habits, marking=marking) if estimator.recorded_steps != 0 else None
        loss = call.evaluate(autocast=True, accessed=accessed, record=record).loss
        if record is not None:
            record.close(own)
            if record.reach(own):
                record.give_up()
        if own is not level.variables.tensors and _depends(loss, level.variables.parameters):
            habits.keeps_graphs = False  # its steps have to be taken at the parameters themselves
    return loss


def _depends(value: Tensor, parameters: Sequence[Tensor]) -> bool:
    if not value.requires_grad or not parameters:
        return False
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in found)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _check_outside(graph: Graph, name: str, accessed: set[str]) -> None:
    """Refuse an optimizer's option that depends on how the levels inside are solved."""
    for inner in graph.structure.inside[name]:
        if inner in accessed:
            raise GraphError(
                f"the hyperparameters of level {name!r}: expected functions of levels outside it; found that one reads "
                f"levels.{inner}, which is solved inside it. Let it read what {inner!r} responds to instead."
            )


def _check_closure(
    variables: Mapping[str, Sequence[Tensor]], name: str, value: Tensor, what: str, allowed: Sequence[str]
) -> None:
    """Refuse a loss, or a hyperparameter, that depends on a level that it did not read through `levels`."""
    owned = [(other, p) for other, own in variables.items() if other not in allowed for p in own]
    if not owned:
        return
    found = torch.autograd.grad(value, [p for _, p in owned], retain_graph=True, allow_unused=True)
    for (other, _), gradient in zip(owned, found, strict=True):
        if gradient is not None:
            raise GraphError(
                f"the {what} of level {name!r} depends on the variables of level {other!r} without an edge: it "
                f"uses the module itself. Declare mlo.Edge({other!r}, {name!r}) and read levels.{other}."
            )
