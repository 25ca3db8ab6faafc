from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from mlo.errors import MloError
from mlo.recipes import kind_union


@dataclass(frozen=True)
class Identity:
    pass


@dataclass(frozen=True)
class Series:
    terms: int
    scale: float | Literal["auto"] = "auto"
    powers: tuple[int, ...] = field(default_factory=lambda: (1, 2))

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise MloError(f"terms must be at least 1; found {self.terms}")


CURVATURE = TypeAdapter(kind_union({"identity": Identity, "series": Series}))


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ('{"kind": "identity"}', Identity()),
        ('{"kind": "series", "terms": 3}', Series(3)),
        ('{"kind": "series", "terms": 3, "scale": 1, "powers": [4]}', Series(3, 1.0, (4,))),
    ],
)
def test_fields_and_defaults_are_those_of_the_class(text: str, built: object) -> None:
    assert CURVATURE.validate_json(text).build() == built


def test_a_part_lists_every_field_in_the_order_of_the_class() -> None:
    part = CURVATURE.validate_json('{"kind": "series", "terms": 3}')
    assert list(part.model_dump().items()) == [("kind", "series"), ("terms", 3), ("scale", "auto"), ("powers", (1, 2))]
    assert type(part).__name__ == "SeriesRecipe"


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "series"}',
        '{"kind": "series", "terms": 1.5}',
        '{"kind": "series", "terms": 3, "scale": "best"}',
        '{"kind": "identity", "terms": 3}',
        '{"kind": "serie", "terms": 3}',
        '{"terms": 3}',
    ],
)
def test_what_the_class_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        CURVATURE.validate_json(text)


def test_the_class_checks_its_own_values() -> None:
    with pytest.raises(ValidationError, match="terms must be at least 1; found 0"):
        CURVATURE.validate_json('{"kind": "series", "terms": 0}')


def test_parts_are_frozen() -> None:
    part = CURVATURE.validate_json('{"kind": "series", "terms": 3}')
    with pytest.raises(ValidationError, match="frozen"):
        part.terms = 4
