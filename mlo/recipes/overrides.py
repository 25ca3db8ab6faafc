"""Overrides: `--set levels.teacher.steps=3` changes one value of a recipe.

Called by `mlo.recipes.loading`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlo.errors import RecipeError
from mlo.recipes.messages import show
from mlo.recipes.strict_yaml import parse_yaml


@dataclass(frozen=True)
class Override:
    """One value given on the command line.

    Attributes:
        text: what was given, `levels.teacher.steps=3`.
        path: the keys that lead to the value.
        value: the value, read as YAML.
    """

    text: str
    path: tuple[str, ...]
    value: Any

    @property
    def scope(self) -> tuple[str, ...]:
        """The path of all that is replaced: setting a `kind` replaces the object that has it."""
        return self.path[:-1] if self.path[-1] == "kind" else self.path

    def concerns(self, path: tuple[str, ...]) -> bool:
        """Whether `path` leads to, into or towards what is replaced."""
        return all(mine == theirs for mine, theirs in zip(self.scope, path, strict=False))


def parse_override(text: str) -> Override:
    """Read `key.path=value`.

    Raises:
        RecipeError: it has no `=` or an empty key, sets what cannot be set, or its value is not YAML.
    """
    dotted, equals, value = text.partition("=")
    path = tuple(key.strip() for key in dotted.split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {text}: expected key.path=value, such as levels.teacher.steps=3")
    if path in (("problem",), ("extends",), ("kind",)):
        raise RecipeError(f"--set {text}: {path[0]!r} can be set in a recipe's file only")
    return Override(text, path, parse_yaml(value, f"--set {text}"))


def apply_overrides(recipe: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Set the values in the order given.

    Mappings on the way that are missing are made; checking the outcome shows whether the schema knows their names.
    Setting a `kind` replaces the object that has it by the bare `{kind: value}`; overrides after it can set its fields.

    Returns:
        A changed copy of `recipe`.

    Raises:
        RecipeError: a path leads through something that is not a mapping.
    """
    changed = copy.deepcopy(recipe)
    for override in overrides:
        _apply(changed, override)
    return changed


def _apply(recipe: dict[str, Any], override: Override) -> None:
    *parents, last = override.scope
    here = recipe
    for depth, key in enumerate(parents, start=1):
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            place = ".".join(parents[:depth])
            raise RecipeError(
                f"--set {override.text}: {place} is {show(here)}, which has no keys; set all of it by --set {place}=..."
            )
    here[last] = copy.deepcopy(override.value) if override.scope == override.path else {"kind": override.value}


def shortest(value: Any) -> Any:
    """Return a value as it is written shortest: a number that is whole as an integer, 2 for 2.0."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole else value
