"""Tensors inside the nested tuples, lists and dictionaries that batches, arguments and outputs are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return a tree with `function` applied to its tensors; everything else stays as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        items = [map_tensors(item, function) for item in tree]
        if type(tree) is tuple:
            return tuple(items)
        if type(tree).__module__ == "torch.return_types":  # what torch.sort and the like return
            return type(tree)(items)
        return type(tree)._make(items) if hasattr(tree, "_make") else tuple(items)
    if isinstance(tree, list):
        items = [map_tensors(item, function) for item in tree]
        return items if type(tree) is list else _like(tree, items, enumerate(items))
    if isinstance(tree, dict):
        values = {key: map_tensors(value, function) for key, value in tree.items()}
        return values if type(tree) is dict else _like(tree, values, values.items())
    return tree


def _like(tree: Any, plain: Any, entries: Iterable[tuple[Any, Any]]) -> Any:
    """Return a container of a subclass with other entries: the plain one where it does not take them."""
    try:
        changed = copy.copy(tree)
        for key, value in entries:
            if tree[key] is not value:
                changed[key] = value
    except Exception:  # noqa: BLE001 - whatever it raises: it cannot be written into
        return plain
    return changed


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found


def are_equal_trees(one: Any, other: Any) -> bool:
    """Return whether two trees are made alike, of equal tensors and of what is equal otherwise."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(are_equal_trees, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal_trees(value, other[key]) for key, value in one.items())
    return bool(one == other)
