import json
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

import mlo
from mlo.errors import RecipeError
from mlo.recipes import LevelRecipe, SchedulerRecipe
from mlo.recipes.schedulers import Span

ADAPTER = TypeAdapter(SchedulerRecipe)
KINDS = [
    {"kind": "cosine", "final_learning_rate": 0.02},
    {"kind": "linear"},
    {"kind": "exponential", "factor": 0.97},
]
ALL = [*KINDS, *({**kind, **warm_up} for kind in [{"kind": "constant"}, *KINDS]
                 for warm_up in ({"warmup_steps": 4}, {"warmup_epochs": 1.5}))]  # fmt: skip


def read(**values):
    return ADAPTER.validate_json(json.dumps(values))


def sgd():
    return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)


def rates(num, *, span=None, **values):
    """The learning rates of the first `num` steps."""
    optimizer = sgd()
    scheduler = read(**values).build(optimizer, span or Span(num))
    found = []
    for _ in range(num):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_makes_no_scheduler():
    assert read(kind="constant").build(sgd(), Span(10)) is None


def test_cosine_falls_from_the_optimizers_rate_to_the_final_one():
    found = rates(5, span=Span(4), kind="cosine", final_learning_rate=0.02)
    assert found == pytest.approx([0.02 + 0.04 * (1 + math.cos(math.pi * step / 4)) for step in range(5)])


def test_linear_falls_to_zero():
    assert rates(6, span=Span(5), kind="linear") == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0], abs=1e-12)


def test_exponential_falls_after_each_epoch():
    found = rates(7, span=Span(7, steps_per_epoch=3), kind="exponential", factor=0.5)
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025])


@pytest.mark.parametrize("warm_up", [{"warmup_steps": 4}, {"warmup_epochs": 2}])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"])
def test_a_warm_up_rises_linearly_and_the_schedule_spans_the_rest(kind, warm_up):
    found = rates(10, span=Span(10, steps_per_epoch=2), **kind, **warm_up)
    assert found[:5] == pytest.approx([0.025, 0.04375, 0.0625, 0.08125, 0.1])
    assert found[4:] == pytest.approx(rates(6, span=Span(6, steps_per_epoch=2), **kind))


def test_a_warm_up_to_a_constant_rate():
    assert rates(4, kind="constant", warmup_steps=2) == pytest.approx([0.05, 0.075, 0.1, 0.1])


@pytest.mark.parametrize("values", ALL, ids=str)
def test_a_resumed_schedule_goes_on_bit_for_bit(values, tmp_path):
    """At every step, through the engine's checkpoints."""

    def engine():
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        level = LevelRecipe.model_validate_json(
            json.dumps({"optimizer": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9}, "scheduler": values})
        )
        problem = level.declare(
            *("net", net, lambda levels, batch: (levels.net(batch) - 1).square().mean(), [torch.ones(4, 3)]),
            total_steps=9,
            steps_per_epoch=2.5,
        )
        return mlo.Engine(mlo.Graph([problem]), seed=0, device="cpu")

    def play(one):
        metrics = one.run(1, total_rounds=9, progress=False)
        del metrics["round_seconds"]
        return metrics

    whole = engine()
    expected = [play(whole) for _ in range(9)]
    assert len({metrics["net.learning_rate"] for metrics in expected}) > 1
    one = engine()
    found = []
    for index in range(9):
        found.append(play(one))
        one.save(tmp_path / f"{index}.pt")
        one = engine()
        one.load(tmp_path / f"{index}.pt")
    assert found == expected
    assert torch.equal(one.graph["net"].module.weight, whole.graph["net"].module.weight)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "linear", "warmup_steps": -1},
        {"kind": "linear", "warmup_steps": 2, "warmup_epochs": 1},
        {"kind": "exponential"},
        {"kind": "exponential", "factor": 0},
        {"kind": "exponential", "factor": 1.1},
        {"kind": "linear", "final_learning_rate": 0.1},
    ],
    ids=str,
)
def test_a_schedule_refuses(values):
    with pytest.raises(ValidationError):
        read(**values)


@pytest.mark.parametrize("values", [{"kind": "linear", "warmup_epochs": 1}, {"kind": "exponential", "factor": 0.5}])
def test_epochs_need_a_problem_that_counts_them(values):
    with pytest.raises(RecipeError, match=r"since this problem counts no epochs; found (warmup_epochs|exponential)"):
        read(**values).build(sgd(), Span(10))


def test_a_level_whose_schedule_does_not_fit_is_named():
    level = LevelRecipe.model_validate(
        {"optimizer": {"kind": "sgd", "learning_rate": 1.0}, "scheduler": {"kind": "cosine", "warmup_epochs": 1}}
    )
    with pytest.raises(
        RecipeError, match=r"^level 'low', scheduler: expected .* Lower warmup_epochs, or train longer\.$"
    ):
        level.declare("low", nn.Linear(1, 1), lambda levels, batch: 0, None, total_steps=9, steps_per_epoch=10)


def test_a_warm_up_as_long_as_the_training_is_refused():
    with pytest.raises(RecipeError, match=r"of 4 steps; found one of 4 steps\. Lower warmup_steps, or train longer"):
        read(kind="cosine", warmup_steps=4).build(sgd(), Span(4))
