"""How the errors of recipes are worded.

pydantic says what is wrong in terms of Python and of its own schema. Here that becomes one line per value: the dotted
path as the user wrote it, what was found, what was expected, and the nearest valid name. Called by
`mlo.recipes.loading`; the small helpers by every module of the package that raises errors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_EXPECTATIONS = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number greater than or equal to {ge:g}",
    "int_type": "a whole number",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number less than or equal to {le:g}",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "a string",
    "tuple_type": "a list",
}
"""What a value is expected to be, for the types of pydantic's errors that say no more than that."""

_Path = tuple[str, ...]
_Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Finding:
    """What is wrong at one place of a recipe: the keys that lead there, and the rest of the message."""

    path: _Path
    text: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}" if self.path else self.text


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A clause to append to an error: the one of `names` that is nearest to `name`, or nothing where none is near."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def show(value: Any) -> str:
    """A value read from YAML as one short line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def word_errors(error: ValidationError, recipe: Mapping[str, Any], schema: type[BaseModel]) -> list[Finding]:
    """Word a validation error, one finding a path.

    Args:
        error: what pydantic raised.
        recipe: the data that it was raised about.
        schema: the model that the data was checked against.
    """
    reasons: dict[tuple[_Path, str], list[str]] = {}
    for detail in error.errors(include_url=False):
        path, found, reason = _word(detail, recipe, schema)
        reasons.setdefault((path, found), []).append(reason)
    return [Finding(path, f"found {found}, {_either(several)}") for (path, found), several in reasons.items()]


def _word(detail: ErrorDetails, recipe: Mapping[str, Any], schema: type[BaseModel]) -> tuple[_Path, str, str]:
    """The path of one error, what was found there, and what is wrong with it."""
    location, value, context = detail["loc"], detail["input"], detail.get("ctx", {})
    path = _path_in(recipe, location, is_missing=detail["type"] == "missing")
    match detail["type"]:
        case "extra_forbidden":
            known = [key for model in _models_at(schema, location[:-1]) for key in _keys(model)]
            return path, f"an unknown key with the value {show(value)}", _one_of(known, path[-1])
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = [_kind(model) for model in _models_at(schema, location)]
            found = show(value["kind"]) if "kind" in value else "nothing"
            return (*path, "kind"), found, _one_of(kinds, str(value.get("kind")))
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            return path, show(value), f"expected {context['expected']}{did_you_mean(str(value), choices)}"
        case "missing":
            return path, "nothing", "expected a value"
        case "value_error":
            return path, show(value), str(context["error"])
        case known_type if known_type in _EXPECTATIONS:
            return path, show(value), f"expected {_EXPECTATIONS[known_type].format(**context)}"
        case _:
            return path, show(value), detail["msg"].replace("Input should be", "expected")


def _one_of(names: Sequence[str], name: str) -> str:
    return f"expected one of {', '.join(names)}{did_you_mean(name, names)}"


def _either(reasons: Sequence[str]) -> str:
    """Join the reasons of a union's members, such as a number or "auto", which each report the same value."""
    return " or ".join([reasons[0], *(reason.removeprefix("expected ") for reason in reasons[1:])])


def _path_in(recipe: Mapping[str, Any], location: _Location, *, is_missing: bool) -> _Path:
    """The keys of `location` that are in the recipe: pydantic puts the kinds and members of unions between them."""
    path: list[str] = []
    here: Any = recipe
    for key in location:
        if isinstance(here, dict) and key in here:
            here = here[str(key)]
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
        else:
            continue
        path.append(str(key))
    return (*path, str(location[-1])) if is_missing else tuple(path)


def _models_at(schema: type[BaseModel], location: _Location) -> list[type[BaseModel]]:
    """The models that may check what is at `location`: several where a union's kind is not known."""
    models = [schema]
    for key in location:
        of_kind = [model for model in models if "kind" in model.model_fields and _kind(model) == key]
        inside = [
            found
            for model in models
            if key in model.model_fields
            for found in _models_in(model.model_fields[str(key)].annotation)
        ]
        models = of_kind or inside or models  # neither a kind nor a field: a key or an index of a container
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    arguments = get_args(annotation)
    if not arguments:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return [model for argument in arguments for model in _models_in(argument)]


def _keys(model: type[BaseModel]) -> list[str]:
    """The keys of a mapping in a recipe: a field whose name Python reserves has an alias."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(model: type[BaseModel]) -> str:
    return str(model.model_fields["kind"].default)
