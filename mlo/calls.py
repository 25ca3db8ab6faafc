"""Calls of other levels' modules within one loss call, remembered so that they need not be made again.

As long as the levels that a loss reads stand still, a second evaluation of the same loss gets the remembered outputs,
and a cotangent of them is pulled back once through the kept graph. That is how a level's mixed product costs no second
forward pass of the levels it reads, whatever the loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlo.randomness import set_torch_generator_states, torch_generator_states


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
