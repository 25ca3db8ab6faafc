"""The reverse sweep: total derivatives of a level's loss, one pullback a level, at any depth.

The hypergradient of level u, with E(u) the levels solved inside u:

    a_q  = dL_u/dw_q                          for q = u and for all q that u reads
    for p in E(u), each before the levels that it responds to:
        for q, c in estimator_p.pullback(a_p):   a_q += c
    a_u is the hypergradient

What a pullback goes through is a *record*: the engine writes down each step that may have to be differentiated
(`Step`), and which steps made up one solve (`Solve`). A step's direction is the gradient of the level's total objective
F_p, itself a sweep when levels are solved inside p. `mlo.replay` repeats a recorded solve as a pure function of the
levels above it, so that F_p and its derivatives of any order are at hand. The start of every solve (weights, optimizer
state) is a constant of the map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from mlo.arithmetic import Gradient, Tensors, accumulate, add, dense, norm, scaled, split, summed
from mlo.autodiff import Call, Gradients, aliases
from mlo.calls import Calls
from mlo.distributed import Group, agreed
from mlo.double_backward import check_twice_differentiable, twice_differentiable
from mlo.errors import MloError
from mlo.levels import Undo
from mlo.optimizers import OptimizerState, Update, UpdateCotangents
from mlo.structure import Structure
from mlo.trees import tensors_in


class Weights:
    """One version of a level's variables.

    The newest version is the module's own parameters; the engine copies them (`materialize`) just before they move, if
    a record still refers to them.
    """

    __slots__ = ("live", "recorded", "tensors")

    def __init__(self, tensors: Tensors, *, live: bool = False) -> None:
        self.tensors = tensors
        self.live = live
        self.recorded = False

    def copies(self) -> Tensors:
        """Return copies, which stay what they are when the module's parameters change."""
        with torch.no_grad():
            return tuple([t.clone() for t in self.tensors])

    def materialize(self, copies: Tensors | None = None) -> None:
        """Take a copy, or the one that is given, because the module's parameters are about to change."""
        self.tensors = self.copies() if copies is None else copies
        self.live = False


World = Mapping[str, Weights]
"""The variables of all levels at one moment."""


def values_of(world: World) -> dict[str, Tensors]:
    """Return the variables of the levels that are not at their module's own parameters."""
    return {name: w.tensors for name, w in world.items() if not w.live}


class SecondOrder(Protocol):
    """Second-order products of one step's objective; see `Step.second_order`."""

    def __call__(
        self, direction: Gradient, targets: Sequence[str], *, create_graph: bool = False
    ) -> dict[str, Tensors]:
        """Return d/dw_q <dF_p/dw_p, direction> for each target q."""


class Estimator(Protocol):
    """How a best response is differentiated; see `mlo.Hypergradient`."""

    @property
    def implicit(self) -> bool:
        """Whether a nest differentiates the response by `pullback`, not through the recorded steps."""

    def pullback(self, cotangent: Tensors, response: Response) -> Mapping[str, Tensors]:
        """Pull a cotangent of the level's variables back onto what it responds to."""


Memory = MutableMapping[str, torch.Tensor]
"""What an estimator keeps from one round to the next; its tensors are replaced, never written into."""


@dataclass
class Journal:
    """What estimators keep from round to round, and what they report, in the sweeps of an engine's own steps.

    Attributes:
        memory: by the level whose loss is differentiated and the level whose response is.
        figures: reported since they were last taken: level, name, value.
    """

    memory: dict[tuple[str, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    figures: list[tuple[str, str, torch.Tensor | float]] = field(default_factory=list)

    def copy(self) -> Journal:
        """Return a journal with the same memory, to be written into instead of this one."""
        return Journal({pair: dict(memory) for pair, memory in self.memory.items()})


@dataclass(frozen=True)
class End:
    """Where repeated steps left a level: its variables, its optimizer's state, and how many steps they were."""

    weights: Tensors
    state: OptimizerState
    num_steps: int


Ends = MutableMapping[str, End]
"""Where the levels inside a level were left, for the next repetition to go on from; brought up to date by it."""


class Replay(Protocol):
    """Repeats a recorded solve with other values of the levels outside it; see `mlo.replay.replay_solve`."""

    def __call__(
        self, context: Context, solve: Solve, outer: World, *, create_graph: bool, ends: Ends | None = None
    ) -> Solve:
        """Return the repeated solve."""


@dataclass(frozen=True)
class Context:
    """What every sweep of one engine needs to know.

    Attributes:
        structure: the order of the levels.
        estimators: of each level.
        replay: repeats a recorded solve; `mlo.replay.replay_solve`.
        starts: by level, the level whose variables its solves begin at.
        links: whether a nest differentiates implicit responses by their pullbacks, and not through their steps.
        examined: levels whose losses have been found to have second derivatives.
    """

    structure: Structure
    estimators: Mapping[str, Estimator]
    replay: Replay
    starts: Mapping[str, str] = field(default_factory=dict)
    links: bool = True
    examined: set[str] = field(default_factory=set)


class StepGraph(NamedTuple):
    """The gradient of a step together with its graph, for the first product of the step: it is not computed twice.

    Attributes:
        own: the variables of the level in the graph, copies of what the module's parameters were.
        gradient: of the level's loss with respect to them.
        buffers: `Buffers.versions` of the level after the gradient was computed.
    """

    own: Tensors
    gradient: Gradient
    buffers: list[tuple[int, int]]

    @property
    def copies(self) -> Tensors:
        """The variables themselves."""
        return tuple([t.detach() for t in self.own])


class Partials(NamedTuple):
    """The derivatives of a step's loss by the level and what it reads: `leaves` of them by the outputs of kept calls.

    Attributes:
        gradients: the derivatives.
        state: `state_of` the call when they were taken.
    """

    gradients: Gradients
    state: list[int]

    @classmethod
    def of(cls, call: Call, gradients: Gradients) -> Partials:
        """Return them with the present state."""
        return cls(gradients, cls.state_of(call))

    @staticmethod
    def state_of(call: Call) -> list[int]:
        """Return what makes a loss another function: the modes of its modules, and what was written into batches."""
        modes = [part.training for name in call.levels[call.level].names for part in call.levels[name].parts]
        return [*modes, *(t._version for t in tensors_in([part.batch for part in call.parts]))]


_Source = tuple[dict[str, Tensors], Gradient]
"""What the levels are read at in the graph of a step's gradient, and the gradient."""


@dataclass(frozen=True)
class Step:
    """One recorded optimizer step of a level.

    Attributes:
        call: the level's loss with the batch, random draws, progress and buffers of the step.
        world: the variables of all levels just before the step.
        gradient: that the optimizer was given, before clipping.
        update: the optimizer step.
        inner: the solve of the levels inside this one that came before the step, if any.
        calls: kept calls of other levels' modules, usable while those levels stand still.
        create_graph: whether the step was repeated differentiably and its derivatives must be differentiable too.
        scale: of the loss in the backward pass.
        thin: whether the level's own weights, gradient and optimizer state are left out, to be recomputed.
        graphs: that of the gradient, if it was kept and no product has used it up.
        partials: the derivatives of the loss by the level and what it reads, if they were kept.
    """

    context: Context
    call: Call
    world: World
    gradient: Gradient
    update: Update
    inner: Solve | None = None
    calls: Calls | None = None
    create_graph: bool = False
    scale: float = 1.0
    thin: bool = False
    graphs: list[StepGraph] = field(default_factory=list)
    partials: Partials | None = None

    @property
    def level(self) -> str:
        """Name of the level that took the step."""
        return self.call.level

    @property
    def weights(self) -> Tensors:
        """The level's variables just before the step."""
        return self.world[self.level].tensors

    def pull_back_update(
        self, cotangent: Tensors, state_cotangent: OptimizerState | None = None, *, before: bool = True
    ) -> UpdateCotangents:
        """Pull cotangents of the weights and optimizer state after the step back through the optimizer (and clipping).

        Args:
            cotangent: of the weights.
            state_cotangent: of the optimizer state, None for zero.
            before: whether those of weights and state before the step are wanted; empty otherwise.

        Returns:
            The cotangents of what the optimizer was given: weights, gradient, optimizer state, hyperparameters.
        """
        return self.update.pull_back(
            self.weights, self.gradient, cotangent, state_cotangent, create_graph=self.create_graph, before=before
        )

    def pull_back_hyperparameters(
        self, cotangents: Mapping[str, torch.Tensor], targets: Sequence[str]
    ) -> dict[str, Tensors]:
        """Pull cotangents of the optimizer's options back onto the levels that determine them.

        Args:
            cotangents: by option; none give an empty result.
            targets: levels whose cotangents are wanted.
        """
        attached = self.call.levels[self.level].attached  # in a nest other targets are read by levels inside this one
        targets = [q for q in targets if q in attached]
        if not cotangents or not targets:
            return {}
        values = values_of(self.world)
        call = self.call.along_hyperparameters(cotangents)
        found = call.gradients(values, targets, create_graph=self.create_graph)
        return {q: dense(found.of[q], self.world[q].tensors) for q in targets}

    def product(self, direction: Gradient, targets: Sequence[str]) -> dict[str, Tensors]:
        """Return, for each level of `targets`, d/dw_q <dF_p/dw_p, direction>, exactly, by double backward.

        For q = p this is the Hessian-vector product, for the others the mixed-partial vector product, transposed as a
        pullback needs it; exact too where dF_p is computed by estimators that are not exact.
        """
        with self.second_order(targets) as product:
            return product(direction, targets, create_graph=self.create_graph)

    @contextmanager
    def second_order(self, targets: Sequence[str]) -> Iterator[SecondOrder]:
        """Make the graph of dF_p/dw_p once, for any number of products along different directions.

        Yields:
            A function of (direction, targets, create_graph=False) as `product`; its targets are among those given here.
        """
        if self.inner is None and len(self.call.parts) > 1:
            yield self._mean_product
            return
        all_targets = targets
        with ExitStack() as stack:
            kept = self._take_graph()
            source = stack.enter_context(self._differentiable(targets) if kept is None else self._in_force(kept))

            def product(
                direction: Gradient, targets: Sequence[str], *, create_graph: bool = False
            ) -> dict[str, Tensors]:
                nonlocal kept, source
                if kept is not None:
                    try:
                        return self._product(source, direction, targets, create_graph=create_graph)
                    except (RuntimeError, MloError):  # something was written into, or cannot be recomputed like this
                        self.call.levels[self.level].habits.keeps_graphs = False
                        kept = None
                    stack.close()
                    with torch.enable_grad():  # solvers take products without
                        source = stack.enter_context(self._differentiable(all_targets))
                return self._product(source, direction, targets, create_graph=create_graph)

            yield product

    def _product(
        self, source: _Source, direction: Gradient, targets: Sequence[str], *, create_graph: bool
    ) -> dict[str, Tensors]:
        """Go back through the graph of dF_p/dw_p along a direction."""
        inputs, gradient = source
        own, kept = self.call.levels[self.level], self._kept
        wanted = {q: inputs[q] for q in targets}
        flat = [t for tensors in wanted.values() for t in tensors]
        if kept is not None and (*targets,) != (self.level,):  # its own variables lead into no kept call
            flat += kept.leaves
        grads: Gradient = (None,) * len(flat)
        pairs = [
            (g, d if d.dtype == g.dtype else d.to(g.dtype))
            for g, d in zip(gradient, direction, strict=True)
            if g is not None and d is not None and g.requires_grad
        ]
        if pairs:  # the direction is no input: it may itself depend on the weights, by an earlier product
            with self._second_derivatives(gradient), twice_differentiable(nested=own.nested):
                grads = torch.autograd.grad(
                    [g for g, _ in pairs],
                    flat,
                    [d for _, d in pairs],
                    allow_unused=True,
                    create_graph=create_graph,
                    retain_graph=True,
                )
        return self._split(grads, wanted)

    def _mean_product(
        self, direction: Gradient, targets: Sequence[str], *, create_graph: bool = False
    ) -> dict[str, Tensors]:
        """Make the product one micro-batch at a time: the graphs of all of them at once may not fit."""
        total = {q: tuple(torch.zeros_like(t) for t in self.world[q].tensors) for q in targets}
        for part in self.call.parts:
            with torch.enable_grad(), replace(self, call=part).second_order(targets) as product:
                found = product(direction, targets, create_graph=create_graph)
            total = accumulate(total, found)
        return {q: tuple(t / len(self.call.parts) for t in tensors) for q, tensors in total.items()}

    def difference(
        self, direction: Gradient, targets: Sequence[str], radius: float, *, one_sided: bool = False
    ) -> dict[str, Tensors]:
        """Return what `product` returns, by central differences of dF_p/dw_q at w_p +- radius * v / norm(v).

        Relies on the symmetry of second derivatives. Error: O(radius^2) of the third derivative, plus rounding /
        radius.

        Args:
            direction: v.
            targets: the levels q.
            radius: positive.
            one_sided: take the difference of dF_p/dw_q at w_p + radius * v / norm(v) and at w_p, where the step has
                kept the latter; the error is then O(radius) of the third derivative.
        """

        def side(share: float) -> Tensors:
            with torch.set_grad_enabled(self.create_graph):
                moved = iter(summed(own, across, share))
            return tuple(w if d is None else next(moved) for w, d in zip(self.weights, direction, strict=True))

        level = self.call.levels[self.level]
        here = self._partials(targets) if one_sided else None
        with torch.set_grad_enabled(self.create_graph):
            size = norm(direction, level.variables.group)
            rate = torch.where(size > 0, size, 1.0) * ((0.5 if here is None else 1.0) / radius)
            own = [w for w, d in zip(self.weights, direction, strict=True) if d is not None]
            across = scaled([d for d in direction if d is not None], rate.reciprocal())  # from one side to the other
        try:
            below = self._side(side(-0.5), targets)[0] if here is None else here
            above, inputs = self._side(side(0.5 if here is None else 1.0), targets)
            if here is not None and self._reads_past_marks(here, above, targets):
                level.habits.keeps_graphs = False
                return self.difference(direction, targets, radius)
            change = self._less(above, below, inputs)
        except RuntimeError:  # something was written into, or the graph of a kept call is used up
            if (kept := self._kept) is None or self._group is not None:
                raise
            kept.give_up()
            level.habits.keeps_graphs = False
            return self.difference(direction, targets, radius)
        with torch.set_grad_enabled(self.create_graph):
            return {q: tuple(scaled(tensors, rate)) for q, tensors in change.items()}

    def change(
        self,
        before: Tensors,
        after: Tensors,
        targets: Sequence[str],
        ends: tuple[Ends | None, Ends | None] = (None, None),
    ) -> dict[str, Tensors]:
        """Return dF_p/dw_q at w_p = `after` less that at w_p = `before`, for each level q of `targets`.

        First derivatives only, at any depth.

        Args:
            before: weights of the level.
            after: the same.
            targets: the levels.
            ends: for each of the two, as for `gradient_at`.
        """
        below, _ = self._side(before, targets, ends[0])
        above, inputs = self._side(after, targets, ends[1])
        return self._less(above, below, inputs)

    def _side(
        self, weights: Tensors, targets: Sequence[str], ends: Ends | None = None
    ) -> tuple[Gradients, dict[str, Tensors]]:
        """Return dF_p/dw_q at other weights, and what the targets are read at."""
        values = self._values(weights, targets if self.inner is not None else ())
        return self._total(values, targets, ends), self._inputs(values, targets)

    def _less(self, a: Gradients, b: Gradients, inputs: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Return a - b by target, pulled back. None is zero: one alone may have been given a kept call back."""
        pairs = zip(_flat(a, inputs), _flat(b, inputs), strict=True)
        change = tuple((x if y is None else -y) if x is None or y is None else x - y for x, y in pairs)
        return self._split(change, inputs)

    def _reads_past_marks(self, here: Gradients, there: Gradients, targets: Sequence[str]) -> bool:
        """Whether the loss reads targets otherwise than by marks that were asked for, in one of the processes."""
        past: list[torch.Tensor | None] = []
        if self.calls is not None and here.leaves:
            past += [g for q in targets if q != self.level for g in there.of[q]]
            past += [g for g, is_asked in zip(there.leaves, self.calls.asked, strict=True) if not is_asked]
        return bool(agreed(int(any(g is not None for g in past)), self._group))

    def gradient_at(self, weights: Tensors, ends: Ends | None = None) -> Gradient:
        """Return dF_p/dw_p at other weights of the level; None and zeros as in the recorded gradient.

        Args:
            weights: of the level.
            ends: where the levels inside go on from, instead of the start of the recorded solve; brought up to date, so
                that they converge over many calls however few their steps are.
        """
        found = self._total(self._values(weights), [self.level], ends)
        return like_recorded(self.gradient, found.of[self.level], weights)

    def thinned(self) -> Step:
        """Return the step without what `restored` can recompute.

        In a nest the gradient stays: it depends on what the estimators inside remembered.
        """
        gradient = self.gradient
        if self.inner is None:
            gradient = tuple(None if g is None else g.new_empty(0) for g in gradient)
        world = {**self.world, self.level: Weights(())}
        return replace(self, world=world, gradient=gradient, update=replace(self.update, state=()), thin=True)

    def is_current(self, level: str, end: World) -> bool:
        """Return whether the step read the version of `level` that its solve ended with."""
        return self.world[level] is end[level]

    @property
    def _group(self) -> Group:
        return self.call.parts[0].backend.group

    @property
    def _kept(self) -> Calls | None:
        """The kept calls, if there are any and all levels that they read still stand where they stood."""
        if self.calls is None:
            return None
        self.calls.settle()
        if not self.calls.calls or not all(self.world[c.level].live for c in self.calls.calls):
            return None
        return self.calls

    def _partials(self, targets: Sequence[str]) -> Gradients | None:
        """Return the derivatives at the step's own weights, if the step kept them and the loss is still the same."""
        kept = self._kept  # which forgets the calls where other processes have none
        found, state = self.partials or (None, None)
        usable = (
            found is not None
            and all(q in found.of for q in targets)
            and len(found.leaves) == (len(kept.leaves) if kept is not None else 0)
            and (self.calls is None or self.calls.marked)
            and state == Partials.state_of(self.call)
        )
        return None if agreed(int(not usable), self._group) else found

    def _values(self, own: Tensors, inputs: Iterable[str] = ()) -> dict[str, Tensors]:
        """Return the values to evaluate at; levels left out are read live, at their module's own parameters.

        Args:
            own: of the level itself.
            inputs: levels whose values are to be tensors of their own, to differentiate what is found once more.
        """
        if self.inner is not None:  # otherwise `LossCall` sees to it
            own = aliases(own, create_graph=self.create_graph)
        values = {**values_of(self.world), self.level: own}
        for q in inputs:
            if q in values or self.inner is not None:  # a repeated solve must tell partial from total derivatives
                values[q] = aliases(values.get(q, self.world[q].tensors), create_graph=self.create_graph)
        return values

    def _inputs(self, values: Mapping[str, Tensors], targets: Sequence[str]) -> dict[str, Tensors]:
        """Return what the targets are read at."""
        return {q: values.get(q) or self.call.levels[q].variables.tensors for q in targets}

    def _total(self, values: Mapping[str, Tensors], wrt: Sequence[str], ends: Ends | None = None) -> Gradients:
        """Total derivatives of F_p at any values."""
        if self.inner is None:
            return self.call.gradients(values, wrt, create_graph=self.create_graph, replay=self._kept, only=wrt)
        return self._repeated(values, wrt, create_graph=self.create_graph, ends=ends)

    @contextmanager
    def _differentiable(self, targets: Sequence[str]) -> Iterator[_Source]:
        """Compute dF_p/dw_p, to be differentiated by the targets; without a nest, all stays in force within."""
        own = [self.level]
        values = self._values(self.weights, targets)
        inputs = self._inputs(values, targets)
        if self.inner is not None:
            yield inputs, self._repeated(values, own, create_graph=True).of[self.level]
            return
        with self.call.differentiated(
            values,
            own,
            create_graph=True,
            replay=self._kept,
            follows=targets,
            only=targets or own,
            outlives=self.create_graph,  # a nest goes through it again after the block
        ) as found:
            yield inputs, found.of[self.level]

    @contextmanager
    def _in_force(self, graph: StepGraph) -> Iterator[_Source]:
        """As `_differentiable`, of a kept graph: modules that recompute activations find what the step found."""
        call = self.call.parts[0]
        values = {self.level: graph.own}
        with Undo() as undo:
            call.put_in_force(values, undo)
            yield self._inputs(values, call.levels[self.level].names), graph.gradient

    def _take_graph(self) -> StepGraph | None:
        """Return the kept graph, once, if nothing that it reads has been written into since, as far as is known."""
        if not self.graphs:
            return None
        graph, level = self.graphs.pop(), self.call.levels[self.level]
        if all(self.world[q].live for q in level.reads) and level.buffers.versions() == graph.buffers:
            return graph
        level.habits.keeps_graphs = False
        return None

    def _repeated(
        self, values: Mapping[str, Tensors], wrt: Sequence[str], *, create_graph: bool, ends: Ends | None = None
    ) -> Gradients:
        """Total derivatives of F_p where levels are solved inside it: the solve is repeated, and swept."""
        assert self.inner is not None
        outer = {name: Weights(tensors) for name, tensors in values.items()}
        repeated = self.context.replay(self.context, self.inner, outer, create_graph=create_graph, ends=ends)
        return sweep(self.context, self.call, repeated, repeated.end, wrt, create_graph=create_graph)

    @contextmanager
    def _second_derivatives(self, gradient: Gradient) -> Iterator[None]:
        """Say what to do about an operation that has no second derivative."""
        try:
            if self.level not in self.context.examined:
                check_twice_differentiable(gradient, thrice=self.call.levels[self.level].nested)
                self.context.examined.add(self.level)
            yield
        except RuntimeError as error:
            if not any(hint in str(error) for hint in ("double backward", "is not implemented", "derivative fewer")):
                raise
            if inside := self.context.structure.inside[self.level]:
                often = "twice, and where levels solved inside it are unrolled or solved for, three times"
                mend = (
                    f"Choose mlo.FiniteDifference() for the levels inside ({', '.join(inside)}), which spares third "
                    f"derivatives (BatchNorm in training mode has none), or mlo.Penalty() for this one"
                )
            else:
                often = "twice"
                mend = (
                    "Choose an estimator of first derivatives for the level: mlo.Penalty(), or outside a nest "
                    "mlo.FiniteDifference() or mlo.SAMA()"
                )
            raise MloError(
                f"level {self.level!r}: expected a loss that can be differentiated {often}; found one that cannot "
                f"({error}). {mend}; or leave its modules uncompiled, with operations that torch can differentiate "
                f"often enough."
            ) from error

    def _split(self, grads: Gradient, inputs: Mapping[str, Tensors]) -> dict[str, Tensors]:
        count = sum(len(t) for t in inputs.values())
        flat = [t for tensors in inputs.values() for t in tensors]
        own = grads[:count]
        if len(grads) > count and self._kept is not None:
            with Undo() as undo:  # a module that recomputes its activations must not move its buffers
                for name in {kept.level for kept in self._kept.calls}:
                    self.call.levels[name].buffers.hold(undo)
                own = add(own, self._kept.pull_back(grads[count:], flat))
        parts = split(own, {q: len(tensors) for q, tensors in inputs.items()})
        return {q: dense(parts[q], tensors) for q, tensors in inputs.items()}


@dataclass
class Member:
    """What one level did within a solve.

    Attributes:
        level: the level.
        steps: its recorded steps, oldest first.
        final: the solve of the levels inside it that came after the last step, if any.
        start: the variables of the level that it started from, if any.
        complete: whether all its steps are recorded.
    """

    level: str
    steps: Sequence[Step] = ()
    final: Solve | None = None
    start: Weights | None = None
    complete: bool = True


@dataclass
class Solve:
    """One solve of the levels inside `level`.

    Attributes:
        start: the variables of all levels when it began.
        end: the variables of all levels when it ended.
        members: in the order in which they were solved.
    """

    level: str
    start: World
    members: list[Member] = field(default_factory=list)
    end: World = field(default_factory=dict)

    def within(self, context: Context) -> Solve:
        """Return the solve with another context for all its steps."""

        def moved(solve: Solve | None) -> Solve | None:
            return None if solve is None else solve.within(context)

        members = [
            replace(
                member,
                steps=[replace(step, context=context, inner=moved(step.inner)) for step in member.steps],
                final=moved(member.final),
            )
            for member in self.members
        ]
        return replace(self, members=members)

    def member(self, level: str) -> Member | None:
        """Return what led to the level's variables at the end of the solve."""
        for member in self.members:
            if member.level == level:
                return member
            if member.final is not None and (found := member.final.member(level)) is not None:
                return found
        return None


def _flat(found: Gradients, targets: Iterable[str]) -> Gradient:
    """Return the derivatives by all targets, then those by the kept calls' stand-ins."""
    return (*(g for q in targets for g in found.of[q]), *found.leaves)


@dataclass(frozen=True)
class Response:
    """A level's best response, as an estimator sees it.

    Attributes:
        level: whose best response w_p* is to be differentiated.
        targets: the levels that it responds to and whose cotangents are wanted.
        steps: the recorded steps, oldest first.
        end: the variables of all levels at the end of the solve.
        memory: what the estimator kept in the last round and keeps for the next (saved with the engine); a new, empty
            one where the response is differentiated within a nest.
        start: the target whose variables the level began at, if it began at another level's as they are now.
        complete: whether `steps` are all that were taken.
    """

    level: str
    targets: tuple[str, ...]
    steps: Sequence[Step]
    end: World
    memory: Memory = field(default_factory=dict)
    journal: Journal | None = None
    start: str | None = None
    complete: bool = True

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Report a figure of the estimator, as the metric LEVEL.NAME of the round."""
        if self.journal is not None:
            self.journal.figures.append((self.level, name, value))

    def zeros(self, level: str) -> Tensors:
        """Return a zero cotangent of a level's variables."""
        return tuple(torch.zeros_like(t) for t in self.end[level].tensors)

    def current(self, step: Step) -> tuple[str, ...]:
        """Return the targets that the step read as they are now.

        The others moved after the step: what it read of them was their start, a constant of the solve.
        """
        return tuple(q for q in self.targets if step.is_current(q, self.end))

    def backwards(self) -> Iterator[Step]:
        """Go through the recorded steps, newest first; what a record left out is recomputed, a segment at a time."""
        return newest_first(self.steps)

    def last_step(self) -> Step:
        """Return the last recorded step, reading the targets as they are now."""
        step = self.steps[-1]
        moved = {q: self.end[q] for q in self.targets if not step.is_current(q, self.end)}
        return replace(step, world={**step.world, **moved}, calls=None, graphs=[], partials=None) if moved else step


def sweep(
    context: Context,
    call: Call,
    solve: Solve | None,
    world: World,
    wrt: Sequence[str],
    *,
    create_graph: bool = False,
    moves_buffers: bool = False,
    autocast: bool = False,
    record: Calls | None = None,
    graphs: list[StepGraph] | None = None,
    journal: Journal | None = None,
    scale: float = 1.0,
) -> Gradients:
    """Return the total derivatives of a level's loss: its own reverse sweep over the levels solved inside it.

    Args:
        context: order and estimators.
        call: the level's loss.
        solve: the solve of the levels inside it; None if there are none.
        world: the variables of all levels now.
        wrt: the level itself and those that it responds to whose total derivatives are wanted.
        create_graph: keep the result differentiable.
        moves_buffers: whether the level's own buffers may move.
        autocast: whether the loss runs in the backend's lower precision.
        record: remembers the calls of other levels' modules.
        graphs: receives the graph of the level's own gradient, where it can be kept and no level is solved inside; no
            calls are remembered then.
        journal: of the estimators; None in the sweeps within a nest, which are repeated any number of times.
        scale: loss scale of the backward pass.
    """
    structure, level = context.structure, call.level
    if graphs is not None and _can_keep_graph(call):
        return _with_graph(call, world, graphs)
    inside = structure.inside[level]
    wanted = {*inside, *wrt}
    attached_reads = structure.reads[level]
    attached = [q for q in (level, *attached_reads) if q in wanted]
    values = values_of(world)
    direct = call.gradients(
        values,
        attached,
        create_graph=create_graph,
        moves_buffers=moves_buffers,
        autocast=autocast,
        record=record,
        follows=attached_reads if record is not None else (),
        scale=scale,
    )
    total: dict[str, Gradient] = dict(direct.of)
    for p in structure.sweep_order[level]:
        gradient = total.get(p)
        if gradient is None or all(g is None for g in gradient):
            continue
        assert solve is not None
        targets = tuple(q for q in structure.responds_to[p] if q in wanted)
        memory = journal.memory.setdefault((level, p), {}) if journal is not None else {}
        member, start = solve.member(p), context.starts.get(p)
        assert member is not None
        if start not in targets or member.start is not solve.end[start]:
            start = None
        for q in targets if member.steps else ():
            call.levels[q].variables.refuse_hooks(q)  # they would act on each part of the hypergradient
        response = Response(p, targets, member.steps, solve.end, memory, journal, start, member.complete)
        for q, c in context.estimators[p].pullback(dense(gradient, world[p].tensors), response).items():
            if q in targets:
                total[q] = add(total[q], c) if q in total else tuple(c)
    of = {q: total[q] if q in total else (None,) * len(world[q].tensors) for q in wrt}
    return Gradients(direct.loss, direct.metrics, of, direct.leaves)


def _can_keep_graph(call: Call) -> bool:
    """Whether `_with_graph` can be used: in one process, not on compiled levels, nor past hooks of parameters."""
    own, backend = call.levels[call.level], call.parts[0].backend
    hooked = any(p._backward_hooks for p in own.variables.parameters)
    return backend.group is None and own.compiled is None and own.habits.keeps_graphs and not hooked


def _with_graph(call: Call, world: World, graphs: list[StepGraph]) -> Gradients:
    """Return the derivative of a level's loss by its own variables; `graphs` receives how it was found."""
    level = call.levels[call.level]
    own = tuple([t.requires_grad_() for t in world[level.name].copies()])
    with call.differentiated(
        {level.name: own}, [level.name], create_graph=True, moves_buffers=True, follows=level.attached
    ) as found:
        gradient = found.of[level.name]
    graphs.append(StepGraph(own, gradient, level.buffers.versions()))
    return found._replace(of={level.name: tuple([None if g is None else g.detach() for g in gradient])})


def like_recorded(recorded: Gradient, gradient: Gradient, weights: Tensors) -> Gradient:
    """Give a repeated gradient its zeros and Nones where the recorded one has them."""
    return tuple(
        None if r is None else torch.zeros_like(w) if g is None else g
        for r, g, w in zip(recorded, gradient, weights, strict=True)
    )


def newest_first(steps: Sequence[Step]) -> Iterator[Step]:
    """Go through the steps of one solve, the first of them not thin; recompute what thin ones left out."""
    end = len(steps)
    while end:
        begin = next(index for index in reversed(range(end)) if not steps[index].thin)
        yield from reversed(restored(steps[begin:end]))
        end = begin


def restored(steps: Sequence[Step]) -> list[Step]:
    """Recompute what thin steps left out.

    Args:
        steps: consecutive ones of one solve, the first of them not thin.
    """
    full = [steps[0]]
    for step in steps[1:]:
        before = full[-1]
        with torch.no_grad():
            after, state = before.update.apply(before.weights, before.gradient, before.update.state)
        world = {**step.world, step.level: Weights(after)}
        gradient = step.gradient
        if step.inner is None:
            found = sweep(step.context, step.call, None, world, [step.level], autocast=True, scale=step.scale)
            gradient = like_recorded(gradient, found.of[step.level], after)
        full.append(replace(step, world=world, gradient=gradient, update=replace(step.update, state=state), thin=False))
    return full
