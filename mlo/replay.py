"""Recorded solves, repeated as pure functions of the levels outside them.

A level with levels inside it, a nest, has the total objective F_p: its loss with their responses substituted. To
evaluate and differentiate F_p at other variables of p, the recorded solve inside p is repeated there, from its recorded
start: its steps, or, for an implicit estimator, the end that is known by its pullback. Called by `mlo.sweep.Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from mlo.arithmetic import Gradient, Tensors
from mlo.optimizers import OptimizerState
from mlo.sweep import Context, End, Ends, Member, Response, Solve, Step, Weights, World, like_recorded, sweep, values_of


def replay_solve(
    context: Context, solve: Solve, outer: World, *, create_graph: bool, ends: Ends | None = None
) -> Solve:
    """Repeat a recorded solve, from its recorded start, with other values of the levels outside it.

    With `create_graph` the values are the recorded ones, and the result is a differentiable function of `outer`:
    through the repeated steps, or, for an implicit estimator, by its pullback. Without it, the levels can go on from
    `ends`, which are brought up to date, instead of from the recorded start.
    """
    structure = context.structure
    inside = structure.inside[solve.level]
    start: dict[str, Weights] = {**solve.start, **{name: w for name, w in outer.items() if name not in inside}}
    if ends is not None and not create_graph:
        start.update({q: Weights(ends[q].weights) for q in inside if q in ends})
    end = dict(start)
    place = {member.level: index for index, member in enumerate(solve.members)}
    repeated: dict[str, Member] = {}
    for level in structure.replay_order[solve.level]:
        member = solve.members[place[level]]
        linked = create_graph and context.links and context.estimators[level].implicit and bool(member.steps)
        now = dict(end)
        for later in solve.members[place[level] + 1 :]:
            if not linked:  # the steps were taken before the later members moved
                now.update({q: start[q] for q in (later.level, *structure.inside[later.level])})
        if linked:
            new = _link(context, member, solve.end[level].tensors, now)
        else:
            new = _replay_member(context, member, now, create_graph=create_graph, ends=ends)
        end.update({q: now[q] for q in (level, *structure.inside[level])})
        repeated[level] = new
    return Solve(solve.level, start, [repeated[member.level] for member in solve.members], end)


def _replay_member(
    context: Context, member: Member, now: dict[str, Weights], *, create_graph: bool, ends: Ends | None
) -> Member:
    """Repeat a member's steps, and bring `now` up to date."""
    steps: list[Step] = []
    state: OptimizerState | None = None
    num_steps = 0
    start = context.starts.get(member.level)
    began = None if start is None else now[start]
    if began is not None:
        now[member.level] = Weights(tuple(t.detach() for t in began.tensors) if began.live else began.tensors)
    elif ends is not None and not create_graph and member.level in ends:
        state, num_steps = ends[member.level].state, ends[member.level].num_steps
    for step in member.steps:
        later = replace(step, update=step.update.following(num_steps)) if num_steps else step
        repeated, after, state = _replay_step(context, later, now, state, create_graph=create_graph, ends=ends)
        steps.append(repeated)
        if repeated.inner is not None:
            now.update({q: repeated.inner.end[q] for q in context.structure.inside[member.level]})
        now[member.level] = Weights(after)
    if ends is not None and state is not None:
        ends[member.level] = End(now[member.level].tensors, state, num_steps + len(steps))
    final = _replay_final(context, member, now, create_graph=create_graph, ends=ends)
    return Member(member.level, steps, final, began, member.complete)


def _replay_final(
    context: Context, member: Member, now: dict[str, Weights], *, create_graph: bool, ends: Ends | None = None
) -> Solve | None:
    if member.final is None:
        return None
    final = replay_solve(context, member.final, now, create_graph=create_graph, ends=ends)
    now.update({q: final.end[q] for q in context.structure.inside[member.level]})
    return final


def _link(context: Context, member: Member, after: Tensors, now: dict[str, Weights]) -> Member:
    """Make a member's variables `after` its steps a function of what it responds to; bring `now` up to date."""
    level, outer = member.level, dict(now)
    estimator, recorded = context.estimators[level], member.steps[-1]
    targets = tuple(q for q in context.structure.responds_to[level] if any(t.requires_grad for t in outer[q].tensors))

    def last_step(*, create_graph: bool) -> Step:
        """Repeat the last recorded step from variables that are a function of what the level responds to."""
        before = tuple(t.detach() for t in recorded.weights)
        world = {**outer, level: Weights(respond(before) if create_graph else before)}
        inner = None
        if recorded.inner is not None:
            inner = replay_solve(context, recorded.inner, world, create_graph=create_graph)
            world.update({q: inner.end[q] for q in context.structure.inside[level]})
        return replace(recorded, context=context, world=world, inner=inner, calls=None, create_graph=create_graph)

    def pull_back(cotangent: Tensors) -> Gradient:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            step = last_step(create_graph=create_graph)
            found = estimator.pullback(cotangent, Response(level, targets, (step,), step.world))
        return tuple(g for q in targets for g in found.get(q, (None,) * len(outer[q].tensors)))

    def respond(values: Tensors) -> Tensors:
        inputs = [t for q in targets for t in outer[q].tensors]
        return tuple(_Linked.apply(pull_back, len(values), *values, *inputs)) if inputs else values

    now[level] = Weights(respond(tuple(t.detach() for t in after)))
    step = last_step(create_graph=True)
    return Member(level, (step,), _replay_final(context, member, now, create_graph=True))


class _Linked(torch.autograd.Function):
    """Values that are a function of `inputs`, known by its pullback."""

    @staticmethod
    def forward(ctx: Any, pull_back: Callable[[Tensors], Gradient], count: int, *tensors: torch.Tensor) -> Tensors:
        """Return the values, the first `count` of `tensors`."""
        ctx.pull_back, ctx.count = pull_back, count
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        """Pull cotangents of the values back onto the inputs, differentiably if asked for."""
        return None, None, *(None,) * ctx.count, *ctx.pull_back(cotangents)


def _replay_step(
    context: Context, step: Step, now: World, state: OptimizerState | None, *, create_graph: bool, ends: Ends | None
) -> tuple[Step, Tensors, OptimizerState]:
    inner, world = None, dict(now)
    if step.inner is not None:
        inner = replay_solve(context, step.inner, now, create_graph=create_graph, ends=ends)
        world.update({q: inner.end[q] for q in context.structure.inside[step.level]})
    found = sweep(context, step.call, inner, world, [step.level], create_graph=create_graph)
    weights = now[step.level].tensors
    gradient = like_recorded(step.gradient, found.of[step.level], weights)
    options = step.call.hyperparameters(values_of(world), create_graph=create_graph)
    update = replace(step.update, state=step.update.state if state is None else state, hyperparameters=options)
    after, new_state = update.apply(weights, gradient, update.state)
    if not create_graph:
        after = tuple(t.detach() for t in after)
        new_state = tuple({name: t.detach() for name, t in own.items()} for own in new_state)
    return Step(context, step.call, world, gradient, update, inner, None, create_graph), after, new_state
