"""First derivatives of one loss call at any values of the variables, as a pure function.

`LossCall` is a level's loss at one moment: its batch, random draws, progress and buffers are fixed, the variables are
free. Everything else in the package (steps, sweeps, second-order products) is built on `LossCall.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from mlo.arithmetic import Gradient, Tensors, add, split
from mlo.calls import Calls, Evaluation, Habits
from mlo.distributed import Group, average, rank_of, reduced, replicate
from mlo.double_backward import twice_differentiable
from mlo.errors import GraphError, MloError
from mlo.levels import Buffers, Copies, Levels, LevelView, Output, Sum, Undo, Variables
from mlo.randomness import seed_generators, term_key, were_drawn_from
from mlo.sharding import ShardedVariables, ShardedView, find_variables

_AS_IS = nullcontext()
_RECOMPUTES = "hooks on saved tensors in a nest"


@dataclass(frozen=True)
class Backend:
    """Where and in which precision losses are computed.

    Attributes:
        device: of the modules and batches.
        autocast: the lower precision of first-order passes, or None to cast nothing.
        group: the processes over whose batches every loss is averaged, or None for this one alone.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    group: Group = None


@dataclass(frozen=True)
class Level:
    """A level as the differentiation sees it.

    Attributes:
        name: the level's name.
        module: the user's module.
        variables: its trainable parameters.
        buffers: its buffers.
        terms: the user's loss, or those that it is the sum of.
        reads: all levels that the loss may read, detached ones included, itself excluded.
        attached: those of `reads` that are differentiated.
        hyperparameters: options of its optimizer that other levels determine, as functions of them.
        compiled: the module under `torch.compile`, which first-order passes call instead of it.
        nested: whether levels of the graph are solved within a nest, so that third derivatives may be taken.
        parts: of the module, itself the first.
        names: of the level and all that it reads.
        kind_of_view: what losses see the module as: a class that is given it, and what to call in its place.
        view: of the module as first-order passes call it.
        habits: of the calls that its loss makes.
    """

    name: str
    module: nn.Module
    terms: tuple[Callable[[Levels, Any], Any], ...]
    reads: tuple[str, ...]
    attached: tuple[str, ...]
    hyperparameters: Mapping[str, Callable[[Levels], Any]] = field(default_factory=dict)
    compiled: Callable[..., Any] | None = None
    nested: bool = False
    variables: Variables = field(init=False)
    buffers: Buffers = field(init=False)
    parts: tuple[nn.Module, ...] = field(init=False)
    names: tuple[str, ...] = field(init=False)
    kind_of_view: type[LevelView] = field(init=False)
    view: LevelView = field(init=False)
    habits: Habits = field(init=False, default_factory=Habits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (self.name, *self.reads))
        call = self.module if self.compiled is None else self._call_compiled
        object.__setattr__(self, "parts", tuple(self.module.modules()))
        object.__setattr__(self, "variables", find_variables(self.module))
        object.__setattr__(self, "kind_of_view", ShardedView if self.variables.sharded else LevelView)
        object.__setattr__(self, "view", self.kind_of_view(self.module, call))
        object.__setattr__(self, "buffers", Buffers(self.parts))

    def look_over(self) -> None:
        """Find the parts and the buffers that the module has now: some are put in, or registered, late."""
        object.__setattr__(self, "parts", tuple(self.module.modules()))
        self.buffers.find(self.parts)

    def _call_compiled(self, *args: Any, **kwargs: Any) -> Any:
        self.buffers.look()
        assert self.compiled is not None
        return self.compiled(*args, **kwargs)

    def computing(self, **changes: Any) -> Level:
        """Return the level with other functions of the same module; what is known of it stays known."""
        level = replace(self, **changes)
        object.__setattr__(level, "buffers", self.buffers)
        level.habits.load_state_dict(self.habits.state_dict())
        return level


@dataclass(frozen=True)
class LossCall:
    """One level's loss with its batch, random draws, progress and buffers fixed.

    Attributes:
        level: whose loss it is.
        levels: all levels by name.
        batch: on the backend's device.
        key: of the random draws.
        progress: fraction of the run.
        backend: device and precision.
        recorded: whether repetitions must find the buffers as the level's own step finds them.
        buffers: those, written down when the step is taken; until then buffers are read as they are.
        constants: values of levels read through detached edges, in force whatever values are bound.
        objective: a function to differentiate in the place of the level's loss.
        reads: by the place of a term in the loss, the levels that it was seen to read: all, if it moves buffers.
    """

    level: str
    levels: Mapping[str, Level]
    batch: Any
    key: int
    progress: float
    backend: Backend
    recorded: bool = False
    buffers: dict[str, Copies] = field(default_factory=dict)
    constants: Mapping[str, Tensors] = field(default_factory=dict)
    objective: Callable[[Levels, Any], Any] | None = None
    reads: dict[int, set[str]] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[LossCall, ...]:
        """The calls that this one is the mean of: itself alone."""
        return (self,)

    def holding(self, constants: Mapping[str, Tensors]) -> LossCall:
        """Return the call with some values fixed, whatever values are bound."""
        return replace(self, constants=constants)

    def put_in_force(self, values: Mapping[str, Tensors], undo: Undo, *, moves_buffers: bool = False) -> None:
        """Bind values of the levels that the loss may read, and hold their buffers still, until the end of `undo`.

        Args:
            values: of the levels whose parameters are to be replaced; the others keep the module's own.
            undo: puts everything back.
            moves_buffers: whether the level's own buffers may move (in its own step only).
        """
        own = self.levels[self.level]
        levels = [self.levels[name] for name in own.names]
        if moves_buffers and self.recorded:
            for level in levels:
                if not level.buffers.empty:
                    self.buffers[level.name] = level.buffers.copies()
            if not own.buffers.empty and own.compiled is None:  # which looks by itself
                own.buffers.watch(undo)
        for level in levels:
            if level.name in values:
                level.variables.bind(values[level.name], undo)
            if not (level.buffers.empty or (moves_buffers and level is own)):
                level.buffers.hold(undo, self.buffers.get(level.name), moving=level is own)

    def evaluate(
        self,
        *,
        autocast: bool = False,
        double_backward: bool = False,
        record: Calls | None = None,
        replay: Calls | None = None,
        accessed: set[str] | None = None,
        only: Collection[str] | None = None,
    ) -> Output:
        """Call the loss with what is in force.

        Args:
            autocast: whether the backend's lower precision applies (never in second-order products).
            double_backward: whether the result will be differentiated twice, which a compiled module's cannot be.
            record: takes notes of the calls of other levels' modules.
            replay: gives kept calls back where nothing has changed.
            accessed: receives the names that the loss read; compiled modules are left out, for what is compiled under
                the hooks of a first look would be compiled again without them.
            only: leave terms of the loss out that were seen to read none of these levels.

        Returns:
            The loss, a scalar that depends on what is bound, and the metrics.

        Raises:
            GraphError: the loss reads a level without an edge, or does not return a scalar.
        """
        own, backend = self.levels[self.level], self.backend
        evaluation = Evaluation()

        def view(name: str) -> LevelView:
            level = self.levels[name]
            if name != self.level and replay is not None:
                return level.kind_of_view(level.module, replay.player(name, level.parts, evaluation))
            if name != self.level and record is not None:
                return level.kind_of_view(level.module, record.recorder(name, level.parts, evaluation))
            as_it_is = double_backward or accessed is not None
            return level.kind_of_view(level.module, level.module) if as_it_is else level.view

        views = {name: view(name) for name in own.names}
        terms = own.terms if self.objective is None else (self.objective,)
        results = []
        casting = _casting(backend, enabled=autocast) if backend.autocast else _AS_IS
        with _AS_IS if torch.is_grad_enabled() else torch.enable_grad(), casting:
            # What other processes see of a batch has draws of its own; a function of variables alone has the same ones.
            rank = rank_of(backend.group) if self.objective is None else 0
            num_buffers = len(self._versions()) if len(terms) > 1 else 0
            for index, term in enumerate(terms):
                if only is not None and index in self.reads and self.reads[index].isdisjoint(only):
                    continue
                evaluation.begin(index)
                key = term_key(self.key, rank, index)
                seed_generators(key, backend.device)
                levels = Levels(self.level, views, self.progress)
                before = self._versions() if index + 1 < len(terms) else None
                results.append(checked_output(self.level, term(levels, self.batch)))
                if self.objective is None:
                    self.reads[index] = levels._accessed
                    if before is not None and before != self._versions():  # which the following terms may go by
                        self.reads[index] = set(own.names)
                if (
                    (accessed is not None or (record is not None and record.calls))
                    and not own.habits.draws
                    and were_drawn_from(key)
                ):
                    own.habits.draws = True
                    if record is not None:  # by how much a kept call moves the generators has not been written down
                        record.forget()
                if accessed is not None:
                    accessed |= levels._accessed
            if len(terms) > 1 and len(self._versions()) != num_buffers:  # what moves has only now come to light
                self.reads.update({index: set(own.names) for index in self.reads})
        evaluation.end()
        return Sum.of(results or [torch.zeros((), device=backend.device)])

    def _versions(self) -> list[tuple[int, int]]:
        """Return how often each buffer that the loss may go by has been written into."""
        return [version for name in self.levels[self.level].names for version in self.levels[name].buffers.versions()]

    def hyperparameters(
        self, values: Mapping[str, Tensors], *, create_graph: bool = False, accessed: set[str] | None = None
    ) -> dict[str, Tensor]:
        """Evaluate the options of the level's optimizer that other levels determine.

        Args:
            values: by level; levels not given are read at their module's own parameters.
            create_graph: let the result be a function of the values of attached levels.
            accessed: receives the names that were read.

        Raises:
            GraphError: one reads a level without an edge, or does not return a number.
        """
        own = self.levels[self.level]
        if not own.hyperparameters:
            return {}
        bound: dict[str, Tensors] = {}
        for name in own.reads:
            tensors = self.constants.get(name, values.get(name, self.levels[name].variables.tensors))
            attached = create_graph and name in own.attached and name in values
            bound[name] = tensors if attached else tuple(t.detach() for t in tensors)
        views = {
            name: self.levels[name].kind_of_view(self.levels[name].module, self.levels[name].module)
            for name in own.reads
        }
        levels = Levels(self.level, views, self.progress, what="hyperparameters")
        with Undo() as undo, torch.set_grad_enabled(create_graph):
            self.put_in_force(bound, undo)
            seed_generators(self.key, self.backend.device)
            found = {name: _option(self.level, name, f(levels)) for name, f in own.hyperparameters.items()}
        if accessed is not None:
            accessed |= levels._accessed
        return found

    def along_hyperparameters(self, cotangents: Mapping[str, Tensor]) -> LossCall:
        """Return a call whose derivatives are those of the level's hyperparameters along cotangents of them."""
        functions = self.levels[self.level].hyperparameters

        def objective(levels: Levels, batch: Any) -> Tensor:  # noqa: ARG001
            terms = [(_option(self.level, name, functions[name](levels)) * c).sum() for name, c in cotangents.items()]
            return torch.stack(terms).sum()

        return replace(self, objective=objective)

    @contextmanager
    def differentiated(
        self,
        values: Mapping[str, Tensors],
        wrt: Sequence[str],
        *,
        create_graph: bool = False,
        moves_buffers: bool = False,
        follows: Sequence[str] = (),
        **options: Any,
    ) -> Iterator[Gradients]:
        """Differentiate the loss with respect to the levels `wrt`; what is bound stays in force within the block.

        Partial derivatives: a value that is itself a function of another level's variables counts as independent,
        although with `create_graph` the result stays differentiable through it.

        Args:
            values: by level; levels not given are read at their module's own parameters.
            wrt: the levels to differentiate with respect to.
            create_graph: make the gradients differentiable themselves.
            moves_buffers: whether the level's own buffers may move.
            follows: levels read at their own parameters that the graph must reach, although not in `wrt`.
            options: for the evaluation (`autocast`, `record`, `replay`, `only`) and the backward pass: `scale`, a
                factor on the loss, divided out again (for fp16).
        """
        inputs, bound = self._bindings(values, wrt, follows, create_graph=create_graph)
        with Undo() as undo:
            self.put_in_force(bound, undo, moves_buffers=moves_buffers)
            yield self._gradients(inputs, wrt, create_graph=create_graph, **options)

    def gradients(
        self,
        values: Mapping[str, Tensors],
        wrt: Sequence[str],
        *,
        create_graph: bool = False,
        moves_buffers: bool = False,
        follows: Sequence[str] = (),
        **options: Any,
    ) -> Gradients:
        """Return what `differentiated` gives.

        Raises:
            MloError: the gradients are to be differentiable, and a module recomputes its activations when they are.
        """
        inputs, bound = self._bindings(values, wrt, follows, create_graph=create_graph)
        with Undo() as undo:
            self.put_in_force(bound, undo, moves_buffers=moves_buffers)
            return self._gradients(inputs, wrt, create_graph=create_graph, outlives=create_graph, **options)

    def _bindings(
        self, values: Mapping[str, Tensors], wrt: Sequence[str], follows: Sequence[str], *, create_graph: bool
    ) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
        """Return what to differentiate with respect to, and what takes the place of parameters, by level."""
        own, in_place = self.levels[self.level], self._is_in_place(create_graph=create_graph)
        inputs: dict[str, Tensors] = {}
        bound: dict[str, Tensors] = {}
        for name in own.names:
            variables, tensors = self.levels[name].variables, self.constants.get(name, values.get(name))
            if tensors is None:
                if name in wrt and not in_place:
                    inputs[name] = variables.parameters
                elif name in wrt:
                    inputs[name] = bound[name] = tuple(t.detach().requires_grad_() for t in variables.tensors)
                elif name not in follows or in_place:
                    bound[name] = variables.detached()
            elif name in wrt or name == self.level:
                variables.refuse_hooks(name)
                # An alias, so that the derivative is partial. A loss may go by it which of the level's own variables
                # require a gradient, differentiate with respect to them, or register hooks.
                inputs[name] = bound[name] = aliases(tensors, create_graph=create_graph)
            elif create_graph and name in own.attached:
                bound[name] = tensors
            else:  # by value
                bound[name] = tuple([t.detach() for t in tensors])
        group = self.backend.group
        if group is not None and not in_place:
            for name in own.names:
                live = self.levels[name].variables.parameters if name in wrt or name in follows else ()
                used = bound.get(name, live)
                if any(t.requires_grad for t in used):
                    bound[name] = replicate(used, group, f"{self.level}'s loss, variables of {name}")
        return inputs, bound

    def _gradients(
        self,
        inputs: Mapping[str, Tensors],
        wrt: Sequence[str],
        *,
        create_graph: bool,
        autocast: bool = False,
        record: Calls | None = None,
        replay: Calls | None = None,
        only: Collection[str] | None = None,
        scale: float = 1.0,
        outlives: bool = False,
    ) -> Gradients:
        """Differentiate with respect to `inputs` with what is in force.

        Args:
            inputs: by level.
            wrt: the levels.
            create_graph: as for `differentiated`.
            autocast: for the evaluation.
            record: the same.
            replay: the same.
            only: the same.
            scale: as for `differentiated`.
            outlives: whether the gradients will be differentiated when it is no longer in force.
        """
        in_place = self._is_in_place(create_graph=create_graph)
        record = None if in_place else record  # FSDP frees what a kept graph would go back through
        with twice_differentiable(nested=self.levels[self.level].nested) if create_graph else _AS_IS:
            with self._without_recomputation() if outlives else _AS_IS:
                output = self.evaluate(
                    autocast=autocast, double_backward=create_graph, record=record, replay=replay, only=only
                )
            marks = record.close(inputs.get(self.level, ())) if record is not None else []
            if record is not None and (record.asked or not record.marked):  # else the calls would be gone through
                inputs = {name: tensors for name, tensors in inputs.items() if name == self.level}
            flat = [t for name in wrt for t in inputs.get(name, ())]
            flat += replay.leaves if replay is not None else marks
            grads: Gradient = (None,) * len(flat)
            if output.loss.requires_grad and flat and in_place:
                grads = self._backward(output.loss * scale, inputs, wrt)
            elif output.loss.requires_grad and flat:
                # Where the gradient is to be differentiated, its seed is variable: an operation that has no second
                # derivative then leaves a trace, even if it is the loss's last.
                grads = torch.autograd.grad(
                    output.loss * scale if scale != 1.0 else output.loss,
                    flat,
                    torch.ones_like(output.loss, requires_grad=True) if create_graph else None,
                    create_graph=create_graph,
                    retain_graph=create_graph or replay is not None,  # a side channel may lead into a kept graph
                    allow_unused=True,
                )
        if scale != 1.0:
            grads = tuple(g / scale if g is not None else None for g in grads)
        of: dict[str, Gradient] = {}
        end = 0
        for name in wrt:
            begin, end = end, end + len(inputs.get(name, ()))
            of[name] = grads[begin:end] if name in inputs else (None,) * len(self.levels[name].variables.parameters)
        loss, group = output.loss.detach(), self.backend.group
        if group is not None and in_place:
            loss, of = self._average(loss, of)
        elif group is not None:
            loss = reduced(loss, "SUM", group) / torch.distributed.get_world_size(group)
        leaves = record.by_leaf(grads[end:]) if record is not None else grads[end:]
        return Gradients(loss, output.metrics, of, leaves)

    @contextmanager
    def _without_recomputation(self) -> Iterator[None]:
        """Refuse activation checkpointing within the block: what is recomputed later would find other variables."""
        try:
            with disable_saved_tensors_hooks(_RECOMPUTES):
                yield
        except RuntimeError as error:
            if _RECOMPUTES not in str(error):
                raise
            raise MloError(
                f"level {self.level!r}: expected modules that keep their activations, as the level is part of a nest "
                f"whose gradients are differentiated again; found one that packs or recomputes them "
                f"(torch.utils.checkpoint, or other hooks on saved tensors). Leave that out, or choose mlo.Penalty(), "
                f"which takes first derivatives alone."
            ) from error

    def _is_in_place(self, *, create_graph: bool) -> bool:
        """Whether the loss reads a sharded level, which can only be evaluated in place.

        Raises:
            MloError: derivatives are to be differentiated in a graph with such a level.
        """
        if self.backend.group is None:
            return False
        sharded = [name for name, level in self.levels.items() if level.variables.sharded]
        if create_graph and sharded:
            raise MloError(
                f"level {self.level!r}: expected an estimator of first derivatives, as level {sharded[0]!r} is "
                f"sharded; found one that takes second-order products here. Choose mlo.Penalty(), or outside a nest "
                f"mlo.FiniteDifference() or mlo.SAMA()."
            )
        return any(name in sharded for name in self.levels[self.level].names)

    def _backward(self, loss: Tensor, inputs: Mapping[str, Tensors], wrt: Sequence[str]) -> Gradient:
        """Return what `torch.autograd.grad` would, by a backward pass, which is what FSDP listens to."""
        with ExitStack() as stack:
            found: dict[str, Sequence[Tensor | None]] = {
                name: stack.enter_context(variables.collecting())
                for name in self.levels[self.level].names
                if isinstance(variables := self.levels[name].variables, ShardedVariables)
            }
            loss.backward()  # type: ignore[no-untyped-call]
        return tuple(g for name in wrt if name in inputs for g in found.get(name, [t.grad for t in inputs[name]]))

    def _average(self, loss: Tensor, of: Mapping[str, Gradient]) -> tuple[Tensor, dict[str, Gradient]]:
        """Average over all processes what FSDP has not averaged."""
        names = [name for name in of if not self.levels[name].variables.sharded]
        parameters = [p for name in names for p in self.levels[name].variables.parameters]
        gradients = [g for name in names for g in of[name]]
        found = average([loss, *gradients], [loss, *parameters], self.backend.group, f"{self.level}'s loss in place")
        assert found[0] is not None
        return found[0], {**of, **split(found[1:], {name: len(of[name]) for name in names})}


@dataclass(frozen=True)
class MeanCall:
    """The mean of one loss over several micro-batches: gradient accumulation, in which each of them counts.

    Differentiated one part after the other, so that first derivatives need the memory of one micro-batch.

    Attributes:
        parts: one call a micro-batch, at least two.
    """

    parts: tuple[LossCall, ...]

    @property
    def level(self) -> str:
        """Whose loss it is."""
        return self.parts[0].level

    @property
    def levels(self) -> Mapping[str, Level]:
        """All levels by name."""
        return self.parts[0].levels

    @property
    def key(self) -> int:
        """Of the random draws of the first part."""
        return self.parts[0].key

    def holding(self, constants: Mapping[str, Tensors]) -> MeanCall:
        """As `LossCall.holding`."""
        return MeanCall(tuple(part.holding(constants) for part in self.parts))

    def hyperparameters(self, values: Mapping[str, Tensors], **options: Any) -> dict[str, Tensor]:
        """As `LossCall.hyperparameters`."""
        return self.parts[0].hyperparameters(values, **options)

    def along_hyperparameters(self, cotangents: Mapping[str, Tensor]) -> LossCall:
        """As `LossCall.along_hyperparameters`."""
        return self.parts[0].along_hyperparameters(cotangents)

    @contextmanager
    def differentiated(self, values: Mapping[str, Tensors], wrt: Sequence[str], **options: Any) -> Iterator[Gradients]:
        """As `LossCall.differentiated`."""
        yield self.gradients(values, wrt, **options)

    def gradients(self, values: Mapping[str, Tensors], wrt: Sequence[str], **options: Any) -> Gradients:
        """Return the means of the parts' losses, gradients and metrics."""
        found = [part.gradients(values, wrt, **options) for part in self.parts]
        num = len(found)
        of = {name: found[0].of[name] for name in wrt}
        for other in found[1:]:
            of = {name: add(of[name], other.of[name]) for name in wrt}
        return Gradients(
            torch.stack([f.loss for f in found]).mean(),
            {name: _mean([f.metrics[name] for f in found if name in f.metrics]) for f in found for name in f.metrics},
            {name: tuple(None if g is None else g / num for g in gradient) for name, gradient in of.items()},
        )


def _mean(values: Sequence[Tensor | float]) -> Tensor | float:
    return sum(values[1:], start=values[0]) / len(values)


Call = LossCall | MeanCall
"""A level's loss at one moment."""


class Gradients(NamedTuple):
    """A loss, its metrics and its gradients by level; `leaves` are the cotangents of kept calls' stand-ins or marks."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float]
    of: Mapping[str, Gradient]
    leaves: Gradient = ()


def alias(tensor: Tensor, *, create_graph: bool) -> Tensor:
    """Return a tensor of the same values to differentiate with respect to, part of the graph if one is made."""
    return tensor.view_as(tensor) if create_graph and tensor.requires_grad else tensor.detach().requires_grad_()


def aliases(tensors: Tensors, *, create_graph: bool) -> Tensors:
    """Return `alias` of each."""
    return tuple([alias(t, create_graph=create_graph) for t in tensors])


@contextmanager
def _casting(backend: Backend, *, enabled: bool) -> Iterator[None]:
    with torch.autocast(backend.device.type, backend.autocast, enabled=enabled):
        yield
    torch.clear_autocast_cache()  # which only the end of the caller's own autocast would do, if there is one


def _option(level: str, name: str, value: Any) -> Tensor:
    expected = "two numbers, as a tensor of shape (2,)" if name == "betas" else "one floating-point number, as a tensor"
    if (
        not isinstance(value, Tensor)
        or value.numel() != (2 if name == "betas" else 1)
        or not value.dtype.is_floating_point
    ):
        found = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise GraphError(f"level {level!r}, hyperparameter {name!r}: expected {expected}; found {found}")
    return value.reshape((2,) if name == "betas" else ())


def checked_output(level: str, result: Any) -> Output:
    """Return what a loss returned as an `Output` of a scalar, its metrics detached.

    Raises:
        GraphError: it is not one floating-point number.
    """
    loss = result.loss if isinstance(result, Output) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.dtype.is_floating_point:
        found = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise GraphError(
            f"the loss of level {level!r} must return one floating-point number, as a tensor or an mlo.Output; found "
            f"{found}. Reduce it, for example with .mean()."
        )
    if loss.dim():
        loss = loss.reshape(())
    if not isinstance(result, Output):
        return Output(loss)
    # With their graphs metrics would keep activations until the round is over.
    metrics = {name: m.detach() if isinstance(m, Tensor) else m for name, m in result.metrics.items()}
    return Output(loss, metrics)
