"""The parts that a recipe's schema is made of, and unions of them that are told apart by their `kind`.

An object that a recipe can choose, such as an estimator, is declared once, as a frozen dataclass: `kind_union` derives
from a table of such classes what a recipe may say about them. Called by `mlo.recipes.levels` and by problems' schemas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

BuiltT = TypeVar("BuiltT")
BuiltT_co = TypeVar("BuiltT_co", covariant=True)


class RecipePart(BaseModel):
    """Base of every mapping in a recipe: frozen, refuses unknown keys, infinite numbers and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Buildable(Protocol[BuiltT_co]):
    """What a recipe says about an object, from which the object is made."""

    @property
    def kind(self) -> str:
        """The object's kind."""

    def build(self) -> BuiltT_co:
        """Make the object."""


def kind_union(classes: Mapping[str, type[BuiltT]]) -> Any:
    """Derive the type of a recipe's field from the classes that it can choose from.

    Args:
        classes: two or more frozen dataclasses by their kind. Each checks its own fields in `__post_init__`, where a
            ValueError becomes an error of the recipe.

    Returns:
        The union, told apart by `kind`, of one `RecipePart` a class. A part has the fields and defaults of its class,
        and is a `Buildable` of it.

    Example:
        >>> from dataclasses import dataclass
        >>> from pydantic import TypeAdapter
        >>> @dataclass(frozen=True)
        ... class Identity:
        ...     pass
        >>> @dataclass(frozen=True)
        ... class Damped:
        ...     damping: float = 0.1
        >>> curvature = TypeAdapter(kind_union({"identity": Identity, "damped": Damped}))
        >>> curvature.validate_python({"kind": "damped", "damping": 0.5}).build()
        Damped(damping=0.5)
    """
    parts = tuple(_part(kind, built) for kind, built in classes.items())
    return Annotated[Union[parts], Field(discriminator="kind")]  # noqa: UP007


def _part(kind: str, built: type[BuiltT]) -> type[RecipePart]:
    class Part(RecipePart):
        def build(self) -> BuiltT:
            return built(**{name: value for name, value in self if name != "kind"})

        @model_validator(mode="after")
        def _check(self) -> Part:
            self.build()
            return self

    return create_model(f"{built.__name__}Recipe", __base__=Part, **_fields(kind, built))


def _fields(kind: str, built: Any) -> dict[str, Any]:
    types = get_type_hints(built, include_extras=True)
    own_fields = {field.name: (types[field.name], _default(field)) for field in dataclasses.fields(built)}
    return {"kind": (Literal[kind], kind), **own_fields}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default
