"""Tensors inside the nested tuples, lists and dictionaries that batches, arguments and outputs are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(item, function) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    return tree


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found
