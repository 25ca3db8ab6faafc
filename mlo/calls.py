"""Calls of other levels' modules within one loss call, kept so that they need not be made again.

As long as the levels that a loss reads stand still, a second evaluation of the same loss gets the kept outputs, and a
cotangent of them is pulled back once through the kept graph. That is how a level's mixed product costs no second
forward pass of the levels it reads, whatever the loss is.

The first evaluation is an ordinary one: the loss gets the real outputs, and only notes are taken. A call is given back
later only where it provably is the same one: of the same place among the calls, with equal arguments, none of them
written into since, none made from variables except by another kept call; and, where several processes evaluate the loss
together, the same one in each of them, as they would otherwise go different ways back. Random draws of a call that is
not made are skipped in all generators. Calls whose graph is not an ordinary one are always made: inside activation
checkpoints, which are to keep nothing, and under transformations of functions.

The derivative of the first evaluation by the kept outputs, one side of a difference, can be taken along with its own
gradient: by marks, places in the graph where the loss goes on from them. Those of outputs that other kept calls were
given are left out; a loss that uses such an output by itself, too, has no such side.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from mlo.distributed import Group, are_equal
from mlo.randomness import GeneratorStates, generator_states, set_generator_states
from mlo.trees import map_tensors, tensors_in


@dataclass(frozen=True)
class _Argument:
    """A tensor that a kept call was given: its content, or which output of an earlier kept call it is."""

    tensor: Tensor
    version: int
    origin: tuple[int, int] | None


_PATIENCE = 6


@dataclass
class Habits:
    """What has been seen of one level's steps, and of the calls that its loss makes of other levels' modules.

    It decides what is kept, and so, to rounding, what is computed: an engine saves it.

    Attributes:
        misses: by level, how often in a row a call of its module had to be made again although calls were kept.
        draws: whether the loss or a module that it calls drew from Python's or NumPy's generator.
        keeps_graphs: whether graphs and partial derivatives of the level's steps are worth keeping: no graph was out of
            date when it was wanted, and the loss reads the level by its module.
    """

    misses: dict[str, int] = field(default_factory=dict)
    draws: bool = False
    keeps_graphs: bool = True

    def state_dict(self) -> dict[str, Any]:
        """Return what there is to save."""
        return {"misses": dict(self.misses), "draws": self.draws, "keeps_graphs": self.keeps_graphs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was saved."""
        self.misses, self.draws = dict(state["misses"]), state["draws"]
        self.keeps_graphs = state["keeps_graphs"]

    def keeps(self, level: str) -> bool:
        """Return whether calls of a level's module are worth keeping: those kept so far were of use, or were few."""
        return self.misses.get(level, 0) < _PATIENCE


_Place = tuple[str, int, int]
"""Which call it is: the level, the place of the term of the loss, and how many calls of the level the term made before.

Each term has random draws of its own.
"""


class Evaluation:
    """One evaluation of a loss: the calls made so far, and which outputs they returned.

    Attributes:
        over: whether it is; what calls again recomputes activations.
    """

    def __init__(self) -> None:
        self.over = False
        self._term = 0
        self._numbers: dict[tuple[str, int], int] = {}
        self._origins: dict[int, tuple[Tensor, int, tuple[int, int]]] = {}  # id -> copy, its version, (call, output)

    def begin(self, term: int) -> None:
        """Go on with the term of this place."""
        self._term = term

    def end(self) -> None:
        """Hold nothing that the loss was given any longer."""
        self.over = True
        self._origins.clear()

    def next_place(self, level: str) -> _Place:
        """Return the place of the call that is being made."""
        number = self._numbers.get((level, self._term), 0)
        self._numbers[level, self._term] = number + 1
        return level, self._term, number

    def hand_out(self, copied: Tensor, origin: tuple[int, int]) -> None:
        """Remember of a copy which output of a kept call it is."""
        self._origins[id(copied)] = (copied, copied._version, origin)

    def origin(self, tensor: Tensor) -> tuple[int, int] | None:
        """Return which output of a kept call a tensor is, if it has not been written into."""
        found = self._origins.get(id(tensor))
        return found[2] if found is not None and found[0] is tensor and tensor._version == found[1] else None


class Call:
    """One kept call: what it was given, what it returned, and where the module and the generators stood after it.

    Attributes:
        graph_outputs: the tensors of the output that require a gradient.
        leaves: their stand-ins in later evaluations.
        marks: the places in the graph of the first evaluation where the loss goes on from them.
    """

    def __init__(self, level: str, arguments: Any, output: Any, held: _Held, states: GeneratorStates | None) -> None:
        self.level = level
        self.arguments = arguments
        self.output = output
        self.held = held
        self.states = states
        self.graph_outputs: list[Tensor] = [t for t in tensors_in(output) if t.requires_grad]
        self.leaves: list[Tensor] = [t.detach().requires_grad_() for t in self.graph_outputs]
        self.marks: list[Tensor] = []


class Calls:
    """The kept calls of one loss call.

    Args:
        device: whose random generator the calls may draw from.
        habits: of the loss, brought up to date.
        group: the processes that evaluate the loss together; a call is given back in all of them or in none.
        marking: whether the derivative of the first evaluation by the kept outputs may be asked for.

    Attributes:
        calls: those kept, in their order.
        marking: the same.
        marked: whether the marks tell all: no call was forgotten, none is tied to another or to the level's variables.
        asked: by leaf, whether its mark is one to differentiate by.
    """

    def __init__(self, device: torch.device, habits: Habits, group: Group = None, *, marking: bool = False) -> None:
        self.calls: list[Call] = []
        self.marking = self.marked = marking
        self.asked: list[bool] = []
        self._device = device
        self._habits = habits
        self._group = group
        self._places: dict[_Place, int] = {}
        self._passed_on: set[tuple[int, int]] = set()  # outputs that other kept calls were given: (call, output)
        self._settled = group is None

    def settle(self) -> None:
        """Keep no call in any of several processes where some keep calls and some do not: all go the same way back.

        They call it together, before kept calls are used.
        """
        if not self._settled and not are_equal(2 * self.marked + bool(self.calls), self._group):
            self.forget()
        self._settled = True

    @property
    def leaves(self) -> list[Tensor]:
        """The stand-ins of all outputs, in the order of the calls."""
        return [leaf for call in self.calls for leaf in call.leaves]

    def close(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Find the marks to differentiate by, the evaluation over; they tell all if `marked`.

        Args:
            own: the variables of the level.
        """
        if not self.marking:
            return []
        marks = [
            (mark, (i, k) not in self._passed_on)
            for i, call in enumerate(self.calls)
            for k, mark in enumerate(call.marks)
        ]
        asked = [mark for mark, is_asked in marks if is_asked]
        if self.reach([*own, *asked]):
            self.give_up()
        if self._group is not None and not are_equal(2 * self.marked + bool(asked), self._group):
            self.forget()
        self.asked = [is_asked for _, is_asked in marks]
        return asked if self.marked else []

    def by_leaf(self, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return derivatives by the marks as those by all leaves."""
        each = iter(found)
        return tuple([next(each) if is_asked else None for is_asked in self.asked]) if self.marked else ()

    def recorder(self, level: str, parts: Sequence[nn.Module], evaluation: Evaluation) -> Callable[..., Any]:
        """Return a function that calls a module, given as all its parts, and keeps the calls that can be kept."""
        if not self._habits.keeps(level):
            return parts[0]

        def record(*args: Any, **kwargs: Any) -> Any:
            if evaluation.over:
                return parts[0](*args, **kwargs)
            place = evaluation.next_place(level)
            keepable = not _is_transformed() and _is_plain((args, kwargs)) and not any(map(_is_compiled, parts))
            arguments = _note((args, kwargs), evaluation) if keepable else None
            if arguments is None:
                return parts[0](*args, **kwargs)
            given = tensors_in((args, kwargs)) if self.marking else ()
            origins = {origin for t in given if (origin := evaluation.origin(t)) is not None}
            held, buffers = _Held(parts), _versions(parts)
            before = generator_states(self._device, only_torch=not self._habits.draws)
            output = parts[0](*args, **kwargs)
            if not _is_plain(output) or not held.is_same(_Held(parts)) or buffers != _versions(parts):
                return output  # a loss, or the module's next call, may go on to read what it left there
            if _share_memory((args, kwargs), output):
                return output  # or write through an alias
            after = generator_states(self._device, only_torch=not self._habits.draws)
            self._passed_on |= origins
            self._places[place] = len(self.calls)
            self.calls.append(Call(level, arguments, output, held, None if before == after else after))
            return self._hand_out(len(self.calls) - 1, self._mark if self.marking else _copy, evaluation)

        return record

    def _mark(self, output: Tensor, leaf: Tensor | None) -> Tensor:
        if leaf is not None:
            output = output.view_as(output)
            self.calls[-1].marks.append(output)
        return output.clone()

    def player(self, level: str, parts: Sequence[nn.Module], evaluation: Evaluation) -> Callable[..., Any]:
        """Return a function that gives kept calls of a module back, and makes a call that was not kept.

        Args:
            level: whose module it is.
            parts: of the module, itself the first.
            evaluation: the present one.
        """
        module = parts[0]

        def play(*args: Any, **kwargs: Any) -> Any:
            if evaluation.over:
                return module(*args, **kwargs)
            place = evaluation.next_place(level)
            if _is_transformed():
                return module(*args, **kwargs)
            index = self._places.get(place, -1)
            if index >= 0:
                call = self.calls[index]
                same = _is_same(call.arguments, (args, kwargs), evaluation) and call.held.is_same(_Held(parts))
                index = index if same else -1
            if not are_equal(index, self._group) or index < 0:
                self._habits.misses[level] = self._habits.misses.get(level, 0) + 1
                return module(*args, **kwargs)
            self._habits.misses[level] = 0
            states = self.calls[index].states
            if states is not None:
                set_generator_states(states, self._device)
            return self._hand_out(index, _stand_in, evaluation)

        return play

    def forget(self) -> None:
        """Keep none of the calls made so far."""
        self.calls.clear()
        self._places.clear()
        self.marked = False

    def give_up(self) -> None:
        """Keep none of the calls, and none of the same levels from now on: they are tied to the loss in other ways."""
        for call in self.calls:
            self._habits.misses[call.level] = _PATIENCE
        self.forget()

    def reach(self, variables: Sequence[Tensor]) -> bool:
        """Whether kept outputs depend on these, as no argument of the calls does."""
        outputs = [output for call in self.calls for output in call.graph_outputs]
        if not outputs or not variables:
            return False
        along = [torch.zeros_like(output) for output in outputs]
        starts = [output.view_as(output) for output in outputs]  # hooks on the outputs would be called
        found = torch.autograd.grad(starts, variables, along, retain_graph=True, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def pull_back(self, cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Pull cotangents of `leaves` back through the kept graphs onto `inputs` (one entry each, None for zero).

        What does not require a gradient is no parameter, and no kept graph leads there.
        """
        outputs = [output for call in self.calls for output in call.graph_outputs]
        pairs = [(output, c) for output, c in zip(outputs, cotangents, strict=True) if c is not None]
        if not pairs:
            return (None,) * len(inputs)
        reached, grad_outputs = zip(*pairs, strict=True)
        parameters = [t for t in inputs if t.requires_grad]
        if not parameters:
            return (None,) * len(inputs)
        found = iter(torch.autograd.grad(reached, parameters, grad_outputs, retain_graph=True, allow_unused=True))
        return tuple(next(found) if t.requires_grad else None for t in inputs)

    def _hand_out(self, index: int, copy: Callable[[Tensor, Tensor | None], Tensor], evaluation: Evaluation) -> Any:
        """Return copies of a call's output, which the loss may write into, and remember where they are from."""
        call = self.calls[index]
        place = {id(output): k for k, output in enumerate(call.graph_outputs)}

        def hand(output: Tensor) -> Tensor:
            k = place.get(id(output))
            copied = copy(output, None if k is None else call.leaves[k])
            if k is not None:
                evaluation.hand_out(copied, (index, k))
            return copied

        return map_tensors(call.output, hand)


def _note(arguments: Any, evaluation: Evaluation) -> Any:
    """Replace tensors among arguments by notes of them; None if the loss itself made one from variables."""
    if any(t.requires_grad and evaluation.origin(t) is None for t in tensors_in(arguments)):
        return None
    return map_tensors(arguments, lambda t: _Argument(t, t._version, evaluation.origin(t)))


def _is_same(noted: Any, given: Any, evaluation: Evaluation) -> bool:
    """Whether arguments are those that were noted."""
    if isinstance(noted, _Argument):
        if not isinstance(given, Tensor) or noted.tensor._version != noted.version:
            return False
        origin = evaluation.origin(given)
        if noted.origin is not None or origin is not None:
            return noted.origin == origin
        if given.requires_grad:  # made from variables, as nothing that a kept call was given
            return False
        kept = noted.tensor
        return kept is given or (
            kept.shape == given.shape
            and kept.dtype == given.dtype
            and kept.device == given.device
            and torch.equal(kept, given)
        )
    if type(noted) is not type(given):
        return False
    if isinstance(noted, (tuple, list)):
        return len(noted) == len(given) and all(_is_same(n, g, evaluation) for n, g in zip(noted, given, strict=True))
    if isinstance(noted, dict):
        return noted.keys() == given.keys() and all(_is_same(v, given[k], evaluation) for k, v in noted.items())
    return bool(noted == given)


def _copy(output: Tensor, leaf: Tensor | None) -> Tensor:  # noqa: ARG001
    return output.clone()


def _stand_in(output: Tensor, leaf: Tensor | None) -> Tensor:
    return (output if leaf is None else leaf).clone()


def _is_compiled(part: nn.Module) -> bool:
    """Whether a part of a module is compiled: its graph can then be gone through only once."""
    return "_orig_mod" in part._modules or part._compiled_call_impl is not None


def _is_transformed() -> bool:
    """Whether more than values is computed: activations that are to be recomputed, tangents, batches of calls."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    try:
        with disable_saved_tensors_hooks("there are hooks"):
            return False
    except RuntimeError:
        return True


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_LARGE = 1000


class _Held:
    """What the parts of a module hold as attributes and, but for PyTorch's own modules, what those consist of."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.objects: list[Any] = list(chain.from_iterable([vars(part).values() for part in parts]))
        self.numbers: list[int] = []
        for part in parts:
            if not type(part).__module__.startswith("torch.nn.modules."):
                for name, value in vars(part).items():
                    if name not in _OF_EVERY_MODULE:
                        self._add(value, 2)

    def _add(self, value: Any, depth: int) -> None:
        """Add how often a tensor has been written into, or what is in a container that is not large."""
        if isinstance(value, Tensor):
            self.numbers.append(0 if value.is_inference() else value._version)
        elif isinstance(value, (list, tuple, dict)) and depth:
            self.numbers.append(len(value))
            if len(value) <= _LARGE:
                entries = [*value, *value.values()] if isinstance(value, dict) else value
                self.objects += entries
                for entry in entries:
                    if isinstance(entry, (Tensor, list, tuple, dict)):
                        self._add(entry, depth - 1)

    def is_same(self, other: _Held) -> bool:
        """Whether these are the same objects, or equal constants."""
        return self.numbers == other.numbers and _are_same(self.objects, other.objects)


def _are_same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return len(before) == len(after) and (
        all(map(operator.is_, before, after)) or all(map(_is_unchanged, before, after))
    )


def _is_unchanged(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, tuple):
        return _are_same(before, after)
    return isinstance(before, (bool, int, float, str)) and before == after


def _versions(parts: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Return which buffers the parts hold, and how often each has been written into."""
    return [(id(b), b._version) for part in parts for b in part._buffers.values() if b is not None]


def _share_memory(arguments: Any, output: Any) -> bool:
    """Whether a tensor of the output is an alias of another one or of an argument."""
    seen = {_storage(t) for t in tensors_in(arguments)}
    for t in tensors_in(output):
        if _storage(t) in seen:
            return True
        seen.add(_storage(t))
    return False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _is_plain(tree: Any) -> bool:
    """Whether all of an object is in sight: tensors that can be copied, in containers of the standard kinds."""
    if isinstance(tree, Tensor):
        return tree.layout in (torch.strided, torch.jagged) and not tree.is_inference()
    if isinstance(tree, (tuple, list)):
        standard = type(tree) in (tuple, list) or (hasattr(tree, "_fields") and not hasattr(tree, "__dict__"))
        return standard and all(map(_is_plain, tree))
    if isinstance(tree, dict):
        return type(tree) is dict and all(map(_is_plain, tree.values()))
    return tree is None or isinstance(tree, (bool, int, float, str))
