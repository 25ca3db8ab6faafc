"""`Penalty`: what it says where its solves do not reach their ends, and in nests."""

import pytest
import torch
from torch.optim import SGD, lr_scheduler

import mlo

from .closed_form import GRAPHS, draw
from .quadratics import Vector, relative_error


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shape", ["chain", "nest"])
def test_levels_inside_a_nest_converge_over_the_whole_of_a_solve(shape, steps):
    """However few their own steps: every level is at its best response, with few steps to stay there."""
    form = draw(1, [3, 2, 2], GRAPHS[shape], 0.1)
    own = form.block(2)  # without a direct part, which would hide an error
    form.q[2][own], form.q[2][:, own], form.b[2][own] = 0, 0, 0
    start = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    w = form.solution(start, 2)

    def sgd(_, module):
        return SGD(module.parameters(), lr=0.55, weight_decay=0.1)

    engine = form.engine(w, [mlo.Penalty(steps=30)] * 3, sgd, steps)
    assert relative_error(engine.hypergradient("l2")["w"], form.hypergradient(w, 2)) < 1e-8


def follower(estimator, scheduled, steps=400):
    """The lower level follows the upper one, whose loss wants it at 3: the derivative at 1 is -2."""
    lower, upper = Vector([0.0]), Vector([1.0])
    sgd = SGD(lower.parameters(), lr=0.5)
    scheduler = lr_scheduler.CosineAnnealingLR(sgd, steps) if scheduled else None
    problems = [
        mlo.Problem("lower", lower, lambda levels, batch: (levels.lower() - levels.upper()).square().sum() / 2, sgd,
                    None, steps=steps, scheduler=scheduler, hypergradient=estimator),
        mlo.Problem("upper", upper, lambda levels, batch: (levels.lower() - 3).square().sum() / 2,
                    SGD(upper.parameters(), lr=0.1), None),
    ]  # fmt: skip
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]), device="cpu")


def test_a_rate_that_a_schedule_brought_down_is_not_silent():
    engine = follower(mlo.Penalty(), scheduled=True)
    with pytest.warns(RuntimeWarning, match="level 'lower', Penalty: its solves are far from their ends"):
        metrics = engine.run(1, progress=False)
    assert metrics["lower.penalty_residual"] > 0.99


def test_a_rate_of_its_own():
    engine = follower(mlo.Penalty(learning_rate=0.5), scheduled=True)
    assert float(engine.hypergradient("upper")["w"]) == pytest.approx(-2, abs=1e-4)
    assert engine.run(1, progress=False)["lower.penalty_residual"] < 1e-6


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_the_residual_is_what_the_steps_leave(steps):
    """Every step of SGD halves it; what the last one does is not measured."""
    metrics = follower(mlo.Penalty(steps=steps), scheduled=False).run(1, progress=False)
    assert metrics["lower.penalty_residual"] == pytest.approx(0.5 ** (steps - 1), rel=1e-6)


def test_a_level_that_maximizes():
    lower, upper = Vector([0.0, 0.3]), Vector([1.0, -0.5])

    def concave(levels, batch):
        return -(levels.lower() - levels.upper().tanh()).square().sum()

    def engine(estimator, *, maximize):
        sgd = SGD(lower.parameters(), lr=0.2, maximize=maximize, weight_decay=0.1)
        sign = 1 if maximize else -1
        problems = [
            mlo.Problem("lower", lower, lambda levels, batch: sign * concave(levels, batch), sgd, None, steps=100,
                        hypergradient=estimator),
            mlo.Problem("upper", upper, lambda levels, batch: (levels.lower() - 3).pow(4).sum(),
                        SGD(upper.parameters(), lr=0.1), None),
        ]  # fmt: skip
        return mlo.Engine(mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]), device="cpu")

    expected = engine(mlo.Unroll(), maximize=False).hypergradient("upper")["w"]
    for maximize in (False, True):
        found = engine(mlo.Penalty(strength=1e4), maximize=maximize).hypergradient("upper")["w"]
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlo.Penalty(strength=0), "Penalty: strength must be a positive number; found 0"),
        (lambda: mlo.Penalty(steps=0), "Penalty: steps must be a whole number of at least 1; found 0"),
        (lambda: mlo.Penalty(learning_rate=-1), "Penalty: learning_rate must be a positive number; found -1"),
        (lambda: mlo.SAMA(radius=0), "SAMA: radius must be a positive number; found 0"),
        (lambda: mlo.Unroll(checkpoint=1), "Unroll: checkpoint must be True or False; found 1"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(mlo.MloError, match=message):
        make()
