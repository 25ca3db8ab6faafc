"""The functional views that a loss reads its levels through.

A loss is called as `loss(levels, batch)`; `levels.NAME` behaves like NAME's module, bound to the variables now in
force. The user's module is not copied and not rewritten: for the length of one loss call other tensors take the place
of its parameters (`Variables.bound`), its buffers are held still (`Buffers.held`), and everything is put back
afterwards.

`Calls` remembers the module calls of *other* levels within one loss call. As long as those levels stand still, a second
evaluation of the same loss gets the remembered outputs, and a cotangent of them is pulled back once through the kept
graph. That is how a level's mixed product costs no second forward pass of the levels it reads, whatever the loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mlo.errors import GraphError
from mlo.randomness import set_torch_generator_states, torch_generator_states

Tensors = tuple[Tensor, ...]
"""A level's variables, or a cotangent of them: one tensor a parameter, in the order of `named_parameters()`."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Variables:
    """A module's trainable parameters, and the slots in which other tensors can take their place.

    Attributes:
        names: of the parameters that require a gradient, tied ones once.
        parameters: the parameters themselves, in the same order.
    """

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
            if isinstance(owner, nn.RNNBase):  # reads its weights from a list of its own
                weights = owner._flat_weights
                self._slots += [(weights, i, index[id(w)]) for i, w in enumerate(weights) if id(w) in index]

    def detached(self) -> Tensors:
        """Return the parameters without gradient; they share memory with the parameters."""
        return tuple(p.detach() for p in self.parameters)

    @contextmanager
    def bound(self, tensors: Tensors) -> Iterator[None]:
        """Let `tensors` take the place of the parameters within the block."""
        try:
            for container, key, i in self._slots:
                container[key] = tensors[i]
            yield
        finally:
            for container, key, i in self._slots:
                container[key] = self.parameters[i]


class Buffers:
    """A module's buffers, and how to read the module without moving them."""

    def __init__(self, module: nn.Module) -> None:
        self._batch_norms: list[Any] = [
            m for m in module.modules() if type(m) in _BATCH_NORMS and m.track_running_stats
        ]
        light = {id(m) for m in self._batch_norms}
        self._slots: list[tuple[dict[str, Tensor | None], str]] = [
            (m._buffers, key) for m in module.modules() if id(m) not in light for key in m._buffers
        ]
        self._copies: tuple[Tensor | None, ...] = ()
        self._versions: tuple[Any, ...] = (None,)

    def copies(self) -> tuple[Tensor | None, ...]:
        """Return copies of the buffers that a replay must find as they are now, made anew only where they have moved.

        Batch normalization in training mode does not read its statistics, and in evaluation mode does not move them.
        """
        tensors = [container[key] for container, key in self._slots]
        versions = tuple((id(t), t._version) if t is not None else None for t in tensors)
        if versions != self._versions:
            self._copies = tuple(t.clone() if t is not None else None for t in tensors)
            self._versions = versions
        return self._copies

    @contextmanager
    def held(self, copies: tuple[Tensor | None, ...] | None = None) -> Iterator[None]:
        """Read the module within the block without moving a buffer, its buffers as in `copies` (default: as now).

        Batch normalization in training mode uses batch statistics with and without running ones; switching the running
        ones off is exact and free. All other buffers are replaced by copies.
        """
        switched = [m for m in self._batch_norms if m.training]
        kept = [container[key] for container, key in self._slots]
        source = kept if copies is None else copies
        try:
            for m in switched:
                m.track_running_stats = False
            for (container, key), t in zip(self._slots, source, strict=True):
                container[key] = t.clone() if t is not None else None
            yield
        finally:
            for m in switched:
                m.track_running_stats = True
            for (container, key), t in zip(self._slots, kept, strict=True):
                container[key] = t


class Call:
    """One call of another level's module within a loss: its arguments, its output, and where to cut the graph."""

    def __init__(self, level: str, arguments: Any, output: Any, generator_states: tuple[Tensor, ...] | None) -> None:
        self.level = level
        self.arguments = arguments
        self.output = output
        self.generator_states = generator_states
        self.graph_outputs: list[Tensor] = [t for t in _tensors(output) if t.requires_grad]
        self.leaves: list[Tensor] = [t.detach().requires_grad_() for t in self.graph_outputs]


class Calls:
    """The calls of other levels' modules within one loss call, kept so that they need not be made again.

    Args:
        device: whose random generator the calls may draw from.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[Call] = []
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}  # id of a copy handed out -> (copy, leaf)

    @property
    def leaves(self) -> list[Tensor]:
        """The cut points, in the order of the calls."""
        return [leaf for call in self.calls for leaf in call.leaves]

    def record(self, level: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, remember the call, and return its output cut off from the module's graph."""
        before = torch_generator_states(self.device)
        output = module(*args, **kwargs)
        after = torch_generator_states(self.device)
        drew = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        arguments = _map_tensors((args, kwargs), lambda t: self._origins[id(t)][1] if id(t) in self._origins else t)
        known = {id(leaf) for leaf in self.leaves}
        if not _is_plain(output) or any(t.requires_grad and id(t) not in known for t in _tensors(arguments)):
            return output  # arguments made from variables by the loss itself: the graph must stay in one piece
        call = Call(level, arguments, output, after if drew else None)
        self.calls.append(call)
        return self._hand_out(call)

    def replay(self, level: str, args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]) -> tuple[bool, Any]:
        """Return (True, output) of a remembered, not yet used call with the same arguments, else (False, None)."""
        for index, call in enumerate(self.calls):
            if call.level == level and index not in used and self._same(call.arguments, (args, kwargs)):
                used.add(index)
                if call.generator_states is not None:
                    set_torch_generator_states(call.generator_states, self.device)
                return True, self._hand_out(call)
        return False, None

    def pull_back(self, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Pull cotangents of `leaves` back through the kept graphs onto `inputs` (one entry each, None for zero)."""
        total: list[Tensor | None] = [None] * len(inputs)
        waiting = {id(leaf): c for leaf, c in zip(self.leaves, cotangents, strict=True)}
        for call in reversed(self.calls):  # a call's arguments come from earlier calls only
            pairs = [
                (out, c)
                for out, leaf in zip(call.graph_outputs, call.leaves, strict=True)
                if (c := waiting[id(leaf)]) is not None
            ]
            if not pairs:
                continue
            earlier = [t for t in _tensors(call.arguments) if id(t) in waiting]
            outputs, grad_outputs = zip(*pairs, strict=True)
            grads = torch.autograd.grad(
                outputs, [*inputs, *earlier], grad_outputs, retain_graph=True, allow_unused=True
            )
            for i, g in enumerate(grads[: len(inputs)]):
                total[i] = _plus(total[i], g)
            for leaf, g in zip(earlier, grads[len(inputs) :], strict=True):
                waiting[id(leaf)] = _plus(waiting[id(leaf)], g)
        return total

    def _hand_out(self, call: Call) -> Any:
        replacement = {id(out): leaf for out, leaf in zip(call.graph_outputs, call.leaves, strict=True)}

        def hand(tensor: Tensor) -> Tensor:
            leaf = replacement.get(id(tensor))
            copy = tensor.clone() if leaf is None else leaf.clone()  # the loss may write into what it is given
            if leaf is not None:
                self._origins[id(copy)] = (copy, leaf)
            return copy

        return _map_tensors(call.output, hand)

    def _same(self, recorded: Any, given: Any) -> bool:
        if isinstance(recorded, Tensor) and isinstance(given, Tensor):
            if recorded.requires_grad or given.requires_grad:
                return id(given) in self._origins and self._origins[id(given)][1] is recorded
            return recorded is given or (
                recorded.shape == given.shape and recorded.dtype == given.dtype and torch.equal(recorded, given)
            )
        if type(recorded) is not type(given):
            return False
        if isinstance(recorded, (tuple, list)):
            return len(recorded) == len(given) and all(map(self._same, recorded, given))
        if isinstance(recorded, dict):
            return recorded.keys() == given.keys() and all(self._same(v, given[k]) for k, v in recorded.items())
        return recorded is given or bool(recorded == given)


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
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=lambda: _NOTHING)


class Levels:
    """What a loss receives: one `LevelView` a level that it may read, and the progress of the run.

    Attributes:
        progress: fraction of the run that is done, in [0, 1).
        accessed: the names read so far.
    """

    def __init__(self, reader: str, views: Mapping[str, LevelView], progress: float) -> None:
        self.progress = progress
        self.accessed: set[str] = set()
        self._reader = reader
        self._views = views

    def __getattr__(self, name: str) -> LevelView:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            view = self._views[name]
        except KeyError:
            readable = ", ".join(self._views)
            raise GraphError(
                f"the loss of level {self._reader!r} reads levels.{name}; it may read {readable}. "
                f"Declare mlo.Edge({name!r}, {self._reader!r}), or mend the name."
            ) from None
        self.accessed.add(name)
        return view


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        items = [_map_tensors(item, function) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [_map_tensors(item, function) for item in tree]
    if isinstance(tree, dict):
        return {key: _map_tensors(value, function) for key, value in tree.items()}
    return tree


def _is_plain(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return (type(tree) in (tuple, list) or hasattr(tree, "_fields")) and all(map(_is_plain, tree))
    if isinstance(tree, dict):
        return type(tree) is dict and all(map(_is_plain, tree.values()))
    return tree is None or isinstance(tree, (Tensor, bool, int, float, str))


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(tree, found.append)
    return found
