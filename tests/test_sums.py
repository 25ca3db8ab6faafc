"""A loss written as a sum is the same loss, and no derivative computes a term that it does not need."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

import mlo
from mlo.autodiff import checked_output

from .toys import Centred

ESTIMATORS = [
    mlo.FiniteDifference(radius=1e-4),
    mlo.FiniteDifference(radius=1e-4, last=None),
    mlo.Unroll(),
    mlo.ConjugateGradient(iterations=4),
    mlo.SAMA(),
]


def engine(estimator, *, written_as_sum, micro_batches=1, counts=None):
    """A teacher, a student that learns from data and from the teacher, and what weights the data."""
    torch.manual_seed(0)
    teacher, student, weights = (nn.Linear(3, 2).double() for _ in range(3))
    counts = Counter() if counts is None else counts
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    y = torch.randn(4, 6, 2, dtype=torch.float64)
    data = list(zip(x, y, strict=True))

    def learn(levels, batch):
        counts["learn"] += 1
        return functional.mse_loss(levels.student(batch[0]).tanh(), batch[1])

    def imitate(levels, batch):
        counts["imitate"] += 1
        loss = functional.mse_loss(levels.student(batch[0]).exp(), levels.teacher(batch[0]))
        return mlo.Output(loss, {"distance": loss})

    def decay(levels, batch):
        counts["decay"] += 1
        return (levels.weights.bias * levels.student.bias.sin()).sum()  # does not read the teacher

    def student_loss(levels, batch):
        output = imitate(levels, batch)
        return mlo.Output(learn(levels, batch) + output.loss + decay(levels, batch), output.metrics)

    def teacher_loss(levels, batch):
        return functional.mse_loss(levels.teacher(batch[0] * levels.weights.weight[0]), batch[1])

    def weights_loss(levels, batch):
        return functional.mse_loss(levels.student(batch[0]), batch[1])

    def problem(name, module, loss):
        sgd = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5)
        return mlo.Problem(name, module, loss, sgd, data, hypergradient=estimator, steps=2, micro_batches=micro_batches)

    levels = [
        problem("teacher", teacher, teacher_loss),
        problem("student", student, mlo.Sum(learn, imitate, decay) if written_as_sum else student_loss),
        problem("weights", weights, weights_loss),
    ]
    edges = [
        mlo.Edge("weights", "teacher"), mlo.Edge("teacher", "student"), mlo.Edge("weights", "student"),
        mlo.Edge("student", "weights"),
    ]  # fmt: skip
    return mlo.Engine(mlo.Graph(levels, edges), seed=0, device="cpu")


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_the_same_hypergradients_and_metrics(estimator, micro_batches):
    whole, terms = (engine(estimator, written_as_sum=as_sum, micro_batches=micro_batches) for as_sum in (False, True))
    expected, found = (e.hypergradient("weights") for e in (whole, terms))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
        assert gradient.abs().max() > 1e-6
    assert whole.run(2, progress=False).keys() == (metrics := terms.run(2, progress=False)).keys()
    assert metrics["student.distance"] > 0


def test_terms_that_do_not_matter_are_left_out():
    counts = Counter()
    made = engine(mlo.FiniteDifference(), written_as_sum=True, counts=counts)
    made.run(1, progress=False)
    counts.clear()
    made.run(1, progress=False)
    own_steps, weights_steps = 4, 2
    sides = 2 * weights_steps  # of the last of the two steps, once a hypergradient
    assert counts == {"learn": own_steps, "imitate": own_steps + sides, "decay": own_steps + sides}


def test_a_sum_is_a_loss_and_needs_a_term():
    loss = mlo.Sum(lambda levels, batch: batch, lambda levels, batch: mlo.Output(2 * batch, {"twice": 2 * batch}))
    output = loss(None, torch.tensor(1.5))
    assert (output.loss.item(), output.metrics["twice"].item()) == (4.5, 3.0)
    with pytest.raises(mlo.GraphError, match="expected at least one loss; found none"):
        mlo.Sum()
    with pytest.raises(mlo.GraphError, match=r"expected losses, one after the other: .* found \["):
        mlo.Sum([loss, loss])
    named = [lambda levels, batch: mlo.Output(batch, {"error": 1.0})] * 2
    with pytest.raises(mlo.GraphError, match="found two called error"):
        mlo.Sum(*named)(None, torch.tensor(1.5))


def test_a_check_differentiates_terms_too():
    counts = Counter()
    assert engine(mlo.Unroll(), written_as_sum=True, counts=counts).check("weights", progress=False).passed
    assert counts["imitate"] > counts["learn"]


def test_metrics_keep_no_graph():
    loss = torch.ones((), requires_grad=True).exp()
    kept = checked_output("a", mlo.Output(loss, {"same": loss, "number": 1.0}))
    assert kept.loss.requires_grad
    assert not kept.metrics["same"].requires_grad
    assert kept.metrics["number"] == 1.0


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.FiniteDifference(radius=1e-4, last=None)], ids=repr)
@pytest.mark.parametrize("what", ["buffers", "statistics", "kept calls"])
def test_terms_left_out_matter_to_no_other_term(what, estimator, steps):
    """Neither by the buffers that they move, nor by calls of theirs that are equal to another term's but for the draws.

    The first term does not read the upper level.
    """
    torch.manual_seed(0)
    lows = {"buffers": Centred(), "statistics": nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))}
    low = lows.get(what, nn.Linear(3, 3)).double()
    aux = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    up = nn.Linear(3, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64) + 2

    def first(levels, batch):
        return (levels.low(batch) - levels.aux(batch)).square().mean()

    def second(levels, batch):
        if what == "statistics":  # read from the first step on, but not before it
            low.train(int(low[0].num_batches_tracked) == 0)
            output = levels.low(batch + 1)
            low.train()
            return ((output - levels.aux(batch)) * levels.up.weight).square().mean()
        return ((levels.low(batch + 1) - levels.aux(batch)) * levels.up.weight).square().mean()

    def problem(name, module, loss, **options):
        return mlo.Problem(name, module, loss, torch.optim.SGD(module.parameters(), lr=0.2), [x], **options)

    levels = [
        problem("aux", aux, lambda levels, batch: levels.aux(batch).square().mean()),
        problem("low", low, mlo.Sum(first, second), hypergradient=estimator, steps=steps),
        problem("up", up, lambda levels, batch: (levels.low(batch) - 1).square().mean()),
    ]
    edges = [mlo.Edge("aux", "low"), mlo.Edge("up", "low"), mlo.Edge("low", "up")]
    (level,) = mlo.Engine(mlo.Graph(levels, edges), device="cpu").check("up", directions=4, progress=False).levels
    assert level.error < 1e-6
