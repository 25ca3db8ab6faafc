"""Differences with the last step's own gradient for one side: the numbers of two passes, of which one is spared."""

import random

import pytest
import torch
from torch import nn

import mlo
from mlo.arithmetic import norm
from mlo.hypergradients.steps import pull_back_steps
from tests.toys import assert_resumes

from .quadratics import relative_error
from .random_graphs import flat
from .test_kept_graphs import Averaging, Drifting, Listing, Recomputed


class InTwoPasses(mlo.FiniteDifference):
    """What `one_sided` says, with the step's gradient made again at the step's weights."""

    @property
    def keeps_partials(self):
        return False

    def pullback(self, cotangent, response):
        def product(step, direction, targets):
            if step is not response.steps[-1] or step.inner is not None:
                return step.difference(direction, targets, self.radius)
            rate = self.radius / norm(direction)
            ahead = tuple(w if d is None else w + rate * d for w, d in zip(step.weights, direction, strict=True))
            return {
                q: tuple(t / rate for t in change) for q, change in step.change(step.weights, ahead, targets).items()
            }

        return pull_back_steps(cotangent, response, self.last, product)


def network(first=None):
    return nn.Sequential(first() if first else nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def teaching(estimator, *, student=None, first=None, rule=None, steps=2, micro=1, **options):
    """Three levels, of which the top and the middle are read by calls of calls, as in Learning by Teaching."""
    torch.manual_seed(0)
    modules = {"teacher": network(first), "student": network(first), "rule": network(rule)}
    batches = [(x, y) for x, y in torch.randn(4, 2, 8, 3, dtype=torch.float64)]

    def teacher_loss(levels, batch):
        return (levels.teacher(batch[0] + levels.rule(batch[0])) - batch[1]).square().mean()

    def student_loss(levels, batch):
        labels = levels.teacher(batch[0] + 1)
        return (levels.student(batch[0]) - labels).pow(4).mean() + (levels.rule(labels) * levels.student(labels)).mean()

    def rule_loss(levels, batch):
        x, y = batch
        return (levels.teacher(x) - y).square().mean() + (levels.student(x) - y).square().mean()

    losses = {"teacher": teacher_loss, "student": student or student_loss, "rule": rule_loss}
    problems = [
        mlo.Problem(name, module, losses[name], torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9), batches,
                    hypergradient=estimator, steps=1 if name == "rule" else steps, micro_batches=micro)
        for name, module in modules.items()
    ]  # fmt: skip
    edges = [("rule", "teacher"), ("teacher", "student"), ("rule", "student"), ("teacher", "rule"), ("student", "rule")]
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*names) for names in edges]), seed=1, device="cpu", **options)


def assert_same(make, rounds=3, last=1, tolerance=1e-10, **others):
    engines = [make(kind(last=last, **others)) for kind in (one_sided, InTwoPasses, mlo.FiniteDifference)]
    for _ in range(rounds):
        found, expected, central = (flat(engine.hypergradient("rule").values()) for engine in engines)
        assert relative_error(found, expected) < tolerance
        assert relative_error(central, expected) > 1e3 * tolerance  # else it shows nothing
        for engine in engines:
            engine.run(1, progress=False)
    ends = [flat(p.detach() for level in e.graph.levels for p in level.module.parameters()) for e in engines[:2]]
    assert relative_error(*ends) < tolerance
    return engines[0]


def one_sided(**options):
    return mlo.FiniteDifference(**options, one_sided=True)


@pytest.mark.parametrize("last", [1, 2, None])
def test_the_numbers_are_those_of_two_passes(last):
    assert_same(teaching, last=last)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "first",
    [Drifting, Averaging, Recomputed, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())],
)
def test_modules_with_buffers_and_random_draws(first, train):
    def make(estimator):
        engine = teaching(estimator, first=first)
        for level in engine.graph.levels:
            level.module.train(train)
        return engine

    assert_same(make)


@pytest.mark.parametrize(("estimator", "passes"), [(one_sided(), 1), (mlo.FiniteDifference(), 2)], ids=repr)
def test_the_pass_is_spared(estimator, passes):
    engine = teaching(estimator)
    engine.run(1, progress=False)
    counts = dict.fromkeys(("teacher", "student", "rule"), 0)
    for name in counts:

        def count(*_, name=name):
            counts[name] += 1

        engine.graph[name].module.register_forward_hook(count)
    engine.run(1, progress=False)
    # Two steps each, and the evaluation at the top. The student's loss calls itself and the rule twice.
    assert counts == {"teacher": 2 + 2 + 1 + passes, "student": 2 * 2 + 1 + 2 * passes, "rule": 2 + 2}


def labelled(levels, batch):
    return (levels.student(batch[0]) - batch[1]).square().mean()


def taught(levels, batch):
    return (levels.student(batch[0]) - levels.teacher(batch[0]) * levels.rule[0].weight[0]).pow(4).mean()


def drawing(levels, batch):
    noise = random.random() + torch.rand(3, dtype=torch.float64)
    labels = levels.teacher(batch[0] + random.random()) + levels.rule(batch[1])
    return (levels.student(batch[0] * noise) - labels).square().mean()


def writing(levels, batch):
    labels = levels.teacher(batch[0])
    labels += levels.rule(batch[0])
    logits = levels.rule(labels)
    return (levels.student(batch[0]) + labels + logits * levels.student(batch[1])).pow(2).mean()


class Doubling(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x.mul_(2) if x.requires_grad else 2 * x)


def given_what_is_written_into(levels, batch):
    labels = levels.teacher(batch[0])
    judged = levels.rule(labels)
    return (labels - levels.student(batch[0])).pow(4).mean() + (judged * levels.student(batch[1])).mean()


@pytest.mark.parametrize(
    ("loss", "rule"),
    [(mlo.Sum(labelled, taught), None), (drawing, None), (writing, None), (given_what_is_written_into, Doubling)],
    ids=["sum", "draws", "writes", "written into"],
)
def test_losses(loss, rule):
    assert_same(lambda estimator: teaching(estimator, student=loss, rule=rule))


def test_a_call_whose_argument_follows_from_the_levels_own_weights():
    """Now the same again and now not."""

    def loss(levels, batch):
        coarse = (levels.student(batch[0]) * 50).round().detach() / 50
        labels = levels.teacher(coarse) + levels.rule(batch[0])
        return (labels * levels.student(batch[1])).pow(2).mean() + levels.student(batch[0]).square().mean()

    assert_same(lambda estimator: teaching(estimator, student=loss), radius=0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_is_of_order_radius(order):
    exact = flat(teaching(mlo.Unroll()).hypergradient("rule").values())
    errors = [
        relative_error(
            flat(teaching(mlo.FiniteDifference(r, None, one_sided=order == 1)).hypergradient("rule").values()), exact
        )
        for r in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.1)


def nest(estimator, **options):
    torch.manual_seed(0)
    modules = {name: network() for name in ("low", "middle", "top")}
    x = torch.randn(3, 8, 3, dtype=torch.float64).unbind()

    def loss(name, others):
        def compute(levels, batch):
            return (getattr(levels, name)(batch) - sum(getattr(levels, q)(batch) for q in others)).pow(4).mean()

        return compute

    levels = [
        mlo.Problem(name, module, loss(name, modules.keys() - {name}), torch.optim.SGD(module.parameters(), lr=0.1), x,
                    hypergradient=estimator if name == "low" else mlo.Unroll())
        for name, module in modules.items()
    ]  # fmt: skip
    edges = [mlo.Edge(a, b) for a in modules for b in modules if a != b]
    return mlo.Engine(mlo.Graph(levels, edges), device="cpu", **options)


@pytest.mark.parametrize(
    ("make", "level"),
    [
        (nest, "top"),
        (nest, "middle"),
        (lambda e: teaching(e, precision="bf16"), "rule"),
        (lambda e: teaching(e, first=Listing), "rule"),
    ],
    ids=["nest", "middle", "bf16", "past the view"],
)
def test_where_both_sides_are_made(make, level):
    central, found = (make(estimator).hypergradient(level) for estimator in (mlo.FiniteDifference(), one_sided()))
    torch.testing.assert_close(found, central, rtol=0, atol=0)


def test_resuming(tmp_path):
    assert_resumes(lambda: teaching(one_sided(), first=Drifting), tmp_path)


@pytest.mark.parametrize("options", [{"rollback": True}, {"diagnostics_every": 1}, {"micro": 2}], ids=str)
def test_with_other_uses_of_the_same_solve(options):
    assert_same(lambda estimator: teaching(estimator, **options))


def test_checking():
    (level,) = teaching(one_sided(radius=1e-6, last=None)).check("rule", progress=False).levels
    assert level.error < 1e-5
    assert "with an error of order radius;" in level.claims["teacher"].text
