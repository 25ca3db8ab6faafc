"""What an approximation costs: a level's hypergradient beside the exact derivative of the steps really taken.

Called by the engine every so many rounds, if it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mlo.arithmetic import Tensors, dense
from mlo.autodiff import Call, Gradients
from mlo.errors import GraphError, MloError
from mlo.graph import Graph
from mlo.hypergradients import FirstOrder, Penalty, Unroll
from mlo.optimizers import has_update_rule
from mlo.sharding import is_sharded
from mlo.sweep import Context, Solve, Step, World, newest_first, sweep


def check_interval(interval: int | None, graph: Graph) -> None:
    """Refuse an interval of rounds, or a graph, that no diagnostics can be made for.

    Raises:
        MloError: the interval is no whole number of at least 1.
        GraphError: a level whose optimizer's steps cannot be differentiated.
    """
    if interval is None:
        return
    if type(interval) is not int or interval < 1:
        raise MloError(f"diagnostics_every: expected a whole number of at least 1, or None; found {interval!r}")
    for problem in graph.levels:
        if is_sharded(problem.module):
            raise GraphError(
                f"diagnostics_every: expected levels that are whole, for they need second derivatives; found that "
                f"level {problem.name!r} is sharded. Leave the diagnostics out."
            )
        if problem.name not in graph.structure.tops and not has_update_rule(problem.optimizer):
            raise GraphError(
                f"diagnostics_every: expected optimizers whose steps can be differentiated; found "
                f"{type(problem.optimizer).__name__} in level {problem.name!r}. Teach its update with "
                f"mlo.register_optimizer, or leave the diagnostics out."
            )


def diagnose(
    context: Context, call: Call, solve: Solve, world: World, found: Gradients
) -> Iterator[tuple[str, str, Tensor]]:
    """Compare a level's hypergradient with the one that `Unroll` finds on the same batch and records.

    Levels inside a nest move by the steps that they took, whatever estimator shaped those (the linear solve of an
    implicit one counts as exact).

    Args:
        context: with the estimators in use.
        call: the level's loss.
        solve: the solve inside it, recorded in full.
        world: the variables of all levels.
        found: the hypergradient in use.

    Yields:
        (level, name, value): `hypergradient_cosine`, between the two, and `hypergradient_error`, the norm of their
        difference over that of the exact one, of the level; and the `hessian_asymmetry` of levels inside it, see
        `asymmetries`.
    """
    level = call.level
    exactly = replace(context, estimators=dict.fromkeys(context.structure.names, Unroll()))
    taken = solve.within(replace(context, links=False))
    exact = sweep(exactly, call, taken, world, [level])
    like = world[level].tensors
    used, wanted = (_flat(dense(gradients.of[level], like)) for gradients in (found, exact))
    length, distance = torch.linalg.vector_norm(wanted), torch.linalg.vector_norm(used - wanted)
    yield level, "hypergradient_cosine", _ratio(torch.dot(used, wanted), torch.linalg.vector_norm(used) * length)
    yield level, "hypergradient_error", _ratio(distance, length)
    for p, value in asymmetries(context, solve).items():
        yield p, "hessian_asymmetry", value


def asymmetries(context: Context, solve: Solve) -> dict[str, Tensor]:
    """Measure how far from a Hessian the total curvatures of levels in a nest are.

    Args:
        context: of the engine.
        solve: of which the last step of each level counts.

    Returns:
        For each level of the solve that has levels inside it, and whose estimator takes products with H:
        abs(u'Hv - v'Hu) / max(abs(u'Hv), abs(v'Hu)) for random u and v, H the total curvature as the estimators further
        inside have it. It is 0 where those are exact, or implicit, and not where they are truncated.
    """
    result: dict[str, Tensor] = {}
    for p in context.structure.inside[solve.level]:
        member, first_derivatives = solve.member(p), isinstance(context.estimators[p], (FirstOrder, Penalty))
        if context.structure.inside[p] and not first_derivatives and member is not None and member.steps:
            result[p] = _asymmetry(next(newest_first(member.steps)))
    return result


def _asymmetry(step: Step) -> Tensor:
    generator = torch.Generator().manual_seed(step.call.key)

    def draw() -> Tensors:
        drawn = (torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in step.weights)
        return tuple(t.to(w) for t, w in zip(drawn, step.weights, strict=True))

    u, v = draw(), draw()
    with step.second_order((step.level,)) as product:
        hu, hv = (product(d, (step.level,))[step.level] for d in (u, v))
    one, other = torch.dot(_flat(u), _flat(hv)), torch.dot(_flat(v), _flat(hu))
    return _ratio((one - other).abs(), torch.maximum(one.abs(), other.abs()))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide; zero by anything is zero."""
    return torch.where(a == 0, 0.0, a / b)


def _flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])
