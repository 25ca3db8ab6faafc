from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from mlo.hypergradients import KINDS, FiniteDifference
from mlo.recipes import HypergradientRecipe, LevelRecipe, OptimizerRecipe

OPTIMIZER: TypeAdapter[Any] = TypeAdapter(OptimizerRecipe)
HYPERGRADIENT: TypeAdapter[Any] = TypeAdapter(HypergradientRecipe)


def read(adapter: TypeAdapter[Any], **values: object) -> Any:
    return adapter.validate_json(json.dumps(values))


def parameters() -> list[torch.Tensor]:
    return [torch.zeros(2, requires_grad=True)]


def test_sgd() -> None:
    recipe = read(OPTIMIZER, kind="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    optimizer = recipe.build(parameters())
    assert type(optimizer) is torch.optim.SGD
    expected = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True, "dampening": 0}
    assert expected.items() <= optimizer.defaults.items()
    assert read(OPTIMIZER, kind="sgd", learning_rate=1, momentum=0.5, dampening=0.5).build(parameters()).defaults[
        "dampening"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize(("kind", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw(kind: str, expected: type[torch.optim.Optimizer]) -> None:
    recipe = read(OPTIMIZER, kind=kind, learning_rate=3e-4, betas=[0.5, 0.99], eps=1e-6, weight_decay=1e-3)
    optimizer = recipe.build(parameters())
    assert type(optimizer) is expected
    given = {"lr": 3e-4, "betas": (0.5, 0.99), "eps": 1e-6, "weight_decay": 1e-3}
    assert given.items() <= optimizer.defaults.items()


@pytest.mark.parametrize(
    ("kind", "make"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_defaults_are_those_of_pytorch(kind: str, make: Any) -> None:
    assert (
        read(OPTIMIZER, kind=kind, learning_rate=0.1).build(parameters()).defaults == make(parameters(), 0.1).defaults
    )


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "sgd"},
        {"kind": "sgd", "learning_rate": 0},
        {"kind": "sgd", "learning_rate": True},
        {"kind": "sgd", "learning_rate": 0.1, "momentum": 1},
        {"kind": "sgd", "learning_rate": 0.1, "momentum": -0.1},
        {"kind": "sgd", "learning_rate": 0.1, "weight_decay": -1e-4},
        {"kind": "sgd", "learning_rate": 0.1, "nesterov": True},
        {"kind": "sgd", "learning_rate": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"kind": "adam", "learning_rate": 0.1, "betas": [0.9, 1]},
        {"kind": "adam", "learning_rate": 0.1, "betas": [0.9]},
        {"kind": "adamw", "learning_rate": 0.1, "eps": 0},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        read(OPTIMIZER, **values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_can_be_chosen_by_its_kind_alone(kind: str) -> None:
    assert read(HYPERGRADIENT, kind=kind).build() == KINDS[kind]()


def test_the_defaults_of_a_level() -> None:
    level = LevelRecipe.model_validate_json('{"optimizer": {"kind": "adam", "learning_rate": 3e-4}}')
    assert (level.scheduler.kind, level.steps, level.clip_norm) == ("constant", 1, None)
    assert level.hypergradient.build() == FiniteDifference()


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 1.0}, {"clip_norm": 0}, {"optimizer": "sgd"}, {"loss": 1}])
def test_a_level_refuses(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LevelRecipe.model_validate_json(json.dumps({"optimizer": {"kind": "sgd", "learning_rate": 0.1}, **change}))
