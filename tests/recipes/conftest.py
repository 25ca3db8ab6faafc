"""A small problem's schema, and a way to write its recipes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from mlo.recipes import LevelRecipe, Recipe, RecipePart


class Levels(RecipePart):
    teacher: LevelRecipe
    student: LevelRecipe | None = None


class Group(RecipePart):
    weight: float | Literal["auto"] = "auto"


class TowerRecipe(Recipe):
    rounds: int = 10


class ToyRecipe(TowerRecipe):
    levels: Levels
    batch_size: int = 64
    noise: float = 0.0
    lambda_: float = Field(default=1.0, alias="lambda")
    shuffle: bool = True
    widths: tuple[int, ...] = ()
    groups: dict[str, Group] = Field(default_factory=dict)


@pytest.fixture
def schemas() -> dict[str, type[Recipe]]:
    return {"toy": ToyRecipe, "tower": TowerRecipe}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write an indented text to a file of the temporary folder."""

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def toy(write: Callable[[str, str], Path]) -> Path:
    """A valid recipe of the toy problem that leaves most to the defaults."""
    return write(
        "toy.yaml",
        """\
        problem: toy
        levels:
          teacher:
            optimizer: {kind: sgd, learning_rate: 0.1}
            hypergradient: {kind: finite_difference, radius: 0.02}
        """,
    )
