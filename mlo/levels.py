"""The functional views that a loss reads its levels through.

A loss is called as `loss(levels, batch)`; `levels.NAME` behaves like NAME's module, bound to the variables now in
force. The user's module is not copied and not rewritten: for the length of one loss call other tensors take the place
of its parameters (`Variables.bind`), its buffers are held still (`Buffers.hold`), and everything is put back
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mlo.arithmetic import Tensors
from mlo.errors import GraphError, MloError
from mlo.synchronized import SynchronizedBatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SynchronizedBatchNorm)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Undo:
    """What puts things back at the end of a block, the last first.

    An `ExitStack` of callbacks alone, in a quarter of the time: there is one for every evaluation of a loss.
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def callback(self, function: Callable[[], None]) -> None:
        """Call a function at the end, whatever happens before."""
        self._callbacks.append(function)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._callbacks:
                self._callbacks.pop()()
        finally:
            if self._callbacks:  # an interrupt, or an error
                self.__exit__()


class Variables:
    """A module's trainable parameters, and the slots in which other tensors can take their place.

    Attributes:
        names: of the parameters that require a gradient, tied ones once.
        parameters: the parameters themselves, in the same order.
        sharded: whether `tensors` are shards of them, see `mlo.sharding`.
        group: the processes that hold the shards.
    """

    sharded = False
    group: Any = None

    def __init__(self, module: nn.Module) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self.parameters: tuple[nn.Parameter, ...] = tuple(p for _, p in named)
        index = {id(p): i for i, p in enumerate(self.parameters)}
        self._slots: list[tuple[Any, Any, int]] = []
        for owner in module.modules():
            for key, p in owner._parameters.items():
                if p is not None and id(p) in index:
                    self._slots.append((owner._parameters, key, index[id(p)]))

    def check_unchanged(self, level: str, module: nn.Module) -> None:
        """Refuse a module whose trainable parameters are no longer these.

        Raises:
            MloError: one was replaced, frozen, unfrozen, added or taken away, or is in another module now.
        """
        found = Variables(module)
        now = dict(zip(found.names, found.parameters, strict=True))
        before = dict(zip(self.names, self.parameters, strict=True))
        changed = [name for name in {**before, **now} if before.get(name) is not now.get(name)]
        if changed:
            raise MloError(
                f"level {level!r}: expected the trainable parameters that the engine was built with; found that "
                f"{', '.join(changed)} changed. Make a new mlo.Engine after replacing, freezing or unfreezing them."
            )
        held, holding = ([(id(container), *rest) for container, *rest in v._slots] for v in (self, found))
        if held != holding:
            raise MloError(
                f"level {level!r}: expected the modules that the engine was built with; found that one that holds "
                f"trainable parameters was replaced, added or taken away. Make a new mlo.Engine after that."
            )

    def refuse_hooks(self, level: str) -> None:
        """Refuse hooks on parameters where the loss is to be differentiated at other tensors, which have none.

        Raises:
            MloError: a parameter has one.
        """
        for name, p in zip(self.names, self.parameters, strict=True):
            if p._backward_hooks:
                raise MloError(
                    f"level {level!r}: expected parameters without hooks, as steps are differentiated; found one on "
                    f"{name}, which is meant for the gradient of a step alone. Put what it does into the loss or the "
                    f"optimizer, or choose mlo.FirstOrder(), which differentiates no steps."
                )

    @property
    def tensors(self) -> Tensors:
        """The level's variables as they are now: the parameters."""
        return self.parameters

    def detached(self) -> Tensors:
        """Return the variables without gradient; they share memory with the parameters."""
        return tuple(t.detach() for t in self.tensors)

    def reshard(self) -> None:
        """Let the module hold these parameters, which are always there."""

    def like_parameter(self, index: int, tensor: Tensor) -> Tensor:  # noqa: ARG002
        """Return a tensor of the shape of a variable in the form that the parameter has."""
        return tensor

    def bind(self, tensors: Tensors, undo: Undo) -> None:
        """Let `tensors` take the place of the parameters until the end of `undo`, which puts the module's own back."""
        undo.callback(self._unbind)
        for container, key, i in self._slots:
            container[key] = tensors[i]

    def _unbind(self) -> None:
        for container, key, i in self._slots:
            container[key] = self.parameters[i]


Slot = tuple[dict[str, Tensor | None], str]
"""Where a module keeps a buffer."""

Copies = Mapping[tuple[int, str], Tensor | None]
"""Buffers of one moment, by the identity of the dictionary they are in and the key."""


class Buffers:
    """A module's buffers, and how to read the module without moving them.

    Batch normalization in training mode uses batch statistics with and without running ones: switching these off holds
    them still, is exact and free, and changes nothing in evaluation mode. Where a pass must move them as another one
    did, that is needed only for those that are also called in evaluation mode, and then find them.

    Attributes:
        empty: whether there is nothing to hold still.
        has_others: whether there are buffers besides those of batch normalization.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._reading: set[Any] = set()  # of batch normalizations, those that have been seen in evaluation mode
        self.find(parts)

    def find(self, parts: Sequence[nn.Module]) -> None:
        """Find the buffers that the parts of the module have now."""
        self._batch_norms: list[Any] = [m for m in parts if type(m) in _BATCH_NORMS and m.track_running_stats]
        norms = {id(m) for m in self._batch_norms}
        self._others: list[Slot] = [(m._buffers, key) for m in parts if id(m) not in norms for key in m._buffers]
        self.empty = not self._batch_norms and not self._others
        self.has_others = bool(self._others)

    def copies(self) -> Copies:
        """Return copies of the buffers, which a replay must find as they are now."""
        found: dict[tuple[int, str], Tensor | None] = {}
        for container, key in self._others:
            t = container[key]
            found[id(container), key] = None if t is None else t.clone()
        for key in _STATISTICS:  # many small tensors, of one kind each
            held = [m._buffers for m in self._batch_norms if m._buffers.get(key) is not None]
            copies = torch._foreach_mul([container[key] for container in held], 1) if held else ()
            found.update({(id(container), key): t for container, t in zip(held, copies, strict=True)})
        return found

    def versions(self) -> list[tuple[int, int]]:
        """Return which buffers there are, and how often each was written into; without statistics that are not read."""
        slots = (*self._others, *_slots_of(self._reading))
        return [(id(t), t._version) for t in (container[key] for container, key in slots) if t is not None]

    def look(self) -> None:
        """Find out which batch normalizations are in evaluation mode, as they are about to be called."""
        for module in self._batch_norms:
            self._note(module)

    def watch(self, undo: Undo) -> None:
        """Find out which batch normalizations are called in evaluation mode until the end of `undo`."""
        for m in self._batch_norms:
            undo.callback(m.register_forward_pre_hook(self._note).remove)

    def _note(self, module: nn.Module, args: Any = ()) -> None:  # noqa: ARG002
        if not module.training:
            self._reading.add(module)

    def hold(self, undo: Undo, copies: Copies | None = None, *, moving: bool = False) -> None:
        """Until the end of `undo`, let no buffer move; they are as in `copies` (default: as now).

        Args:
            undo: puts everything back.
            copies: of an earlier moment.
            moving: let copies of what the level's own step moves move as they do in the step. Without it statistics of
                batch normalization stand still; what other modules write into is a copy in either case.
        """
        reading = self._reading if moving else set()
        still = [m for m in self._batch_norms if m not in reading]
        switched = [(m, m.track_running_stats) for m in still]
        written = [*self._others, *_slots_of(reading)]
        fixed = _slots_of(still) if copies is not None else []
        kept = [(container, key, container[key]) for container, key in (*written, *fixed)]

        def release() -> None:
            for m, tracked in switched:  # it may have been held before
                m.__dict__["track_running_stats"] = tracked
            for container, key, t in kept:
                container[key] = t

        undo.callback(release)
        for m, _ in switched:  # past nn.Module.__setattr__, which takes long
            m.__dict__["track_running_stats"] = False
        for container, key in written:
            now = container[key]
            t = now if copies is None else copies.get((id(container), key), now)
            container[key] = None if t is None else t.clone()
        for container, key in fixed:
            assert copies is not None
            container[key] = copies.get((id(container), key), container[key])


def _slots_of(batch_norms: Iterable[nn.Module]) -> list[Slot]:
    return [(m._buffers, key) for m in batch_norms for key in _STATISTICS if key in m._buffers]


class LevelView:
    """One level's module as a loss sees it: call it, or read its attributes."""

    __slots__ = ("_call", "_module")

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the variables now in force."""
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols such as copying look these up on half-made objects
            raise AttributeError(name)
        return getattr(self._module, name)

    def __getitem__(self, key: Any) -> Any:
        return self._module[key]  # type: ignore[index]


_NOTHING: Mapping[str, Tensor | float] = MappingProxyType({})


@dataclass(frozen=True)
class Output:
    """What a loss may return instead of a bare tensor: the loss together with figures to report.

    Attributes:
        loss: scalar tensor that the level minimizes.
        metrics: named scalars, such as an accuracy in [0, 1]; reported as "LEVEL.NAME", never differentiated.

    Raises:
        GraphError: a metric is called "loss" or "learning_rate", which the engine reports itself.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=lambda: _NOTHING)

    def __post_init__(self) -> None:
        if self.metrics and (reserved := {"loss", "learning_rate"} & self.metrics.keys()):
            raise GraphError(
                f"metrics: expected names other than the engine's own; found {', '.join(sorted(reserved))}"
            )


class Sum:
    """A loss that is the sum of several; write one so wherever a part of it reads fewer levels than the rest.

    A derivative with respect to a level is then taken of the terms alone that read it: a hypergradient through a level
    that learns from labels and from a teacher does not repeat the part about the labels. Each term has random draws of
    its own. Metrics are those of all terms.

    Args:
        terms: losses, at least one.

    Attributes:
        terms: the same.

    Raises:
        GraphError: there is no term, or one that is no function; later, two terms have a metric of the same name.

    Example:
        >>> def fit(levels, batch): ...
        >>> def imitate(levels, batch): ...
        >>> loss = Sum(fit, imitate)
    """

    def __init__(self, *terms: Callable[[Levels, Any], Any]) -> None:
        if not terms:
            raise GraphError("Sum: expected at least one loss; found none")
        for term in terms:
            if isinstance(term, Tensor):
                raise GraphError(
                    "Sum: expected functions loss(levels, batch), as the loss of a Problem: loss=Sum(fit, imitate); "
                    "found a tensor. Within a loss add tensors up with +."
                )
            if not callable(term):
                raise GraphError(f"Sum: expected losses, one after the other: Sum(fit, imitate); found {term!r}")
        self.terms = terms

    def __call__(self, levels: Levels, batch: Any) -> Output:
        """Return the sum and all metrics."""
        return self.of([term(levels, batch) for term in self.terms])

    @staticmethod
    def of(results: Sequence[Any]) -> Output:
        """Add up what terms returned."""
        outputs = [result if isinstance(result, Output) else Output(result) for result in results]
        if len(outputs) == 1:
            return outputs[0]
        metrics: dict[str, Tensor | float] = {}
        for output in outputs:
            if same := sorted(metrics.keys() & output.metrics.keys()):
                raise GraphError(f"Sum: expected metrics of different names; found two called {', '.join(same)}")
            metrics.update(output.metrics)
        return Output(sum((o.loss for o in outputs[1:]), start=outputs[0].loss), metrics)


class Levels:
    """What a loss receives: one `LevelView` a level that it may read, and the progress of the run.

    Attributes:
        progress: fraction of the run that is done, in [0, 1).
    """

    def __init__(self, reader: str, views: Mapping[str, LevelView], progress: float, *, what: str = "loss") -> None:
        self.progress = progress
        self._what = what
        self._accessed: set[str] = set()
        self._reader = reader
        self._views = views

    def __getattr__(self, name: str) -> LevelView:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            view = self._views[name]
        except KeyError:
            readable = ", ".join(self._views) or "none"
            mend = (
                "It may not depend on the level's own variables."
                if name == self._reader
                else f"Declare mlo.Edge({name!r}, {self._reader!r}), or mend the name."
            )
            raise GraphError(
                f"the {self._what} of level {self._reader!r} reads levels.{name}; it may read {readable}. {mend}"
            ) from None
        self._accessed.add(name)
        return view
