"""Differences with the last step's own gradient for one side: the numbers of two passes, of which one is spared."""

import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def teaching(estimator, *, teacher=None, student=None, judge=None, first=None, rule=None, steps=2, micro=1, **options):
    """Three levels, of which the top and the middle are read by calls of calls, as in Learning by Teaching.

    `teacher` is its estimator, if it is another one; `student` and `judge` are losses.
    """
    torch.manual_seed(0)
    modules = {"teacher": network(first), "student": network(first), "rule": network(rule)}
    batches = [(x, y) for x, y in torch.randn(4, 2, 8, 3, dtype=torch.float64)]

    def teacher_loss(levels, batch):
        return (levels.teacher(batch[0] + levels.rule(batch[0])) - batch[1]).square().mean()

    def student_loss(levels, batch):
        labels = levels.rule(levels.teacher(batch[0] + 1))
        return (levels.student(batch[0]) - labels).pow(4).mean() + (
            levels.rule(batch[1]) * levels.student(batch[1])
        ).mean()

    def rule_loss(levels, batch):
        x, y = batch
        return (levels.teacher(x) - y).square().mean() + (levels.student(x) - y).square().mean()

    losses = {"teacher": teacher_loss, "student": student or student_loss, "rule": judge or rule_loss}
    problems = [
        mlo.Problem(name, module, losses[name], torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), batches,
                    hypergradient=teacher or estimator if name == "teacher" else estimator,
                    steps=1 if name == "rule" else steps, micro_batches=micro)
        for name, module in modules.items()
    ]  # fmt: skip
    edges = [("rule", "teacher"), ("teacher", "student"), ("rule", "student"), ("teacher", "rule"), ("student", "rule")]
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*names) for names in edges]), seed=1, device="cpu", **options)


def assert_same(make, tolerance=1e-10, **others):
    """The hypergradients of three rounds are those of two passes, and not the central ones; so are the weights."""
    engines = [make(kind(**others)) for kind in (one_sided, InTwoPasses, mlo.FiniteDifference)]
    for _ in range(3):
        found, expected, central = (flat(engine.hypergradient("rule").values()) for engine in engines)
        assert relative_error(found, expected) < tolerance
        assert relative_error(central, expected) > 1e3 * tolerance
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


def chained(levels, batch):
    return (levels.student(batch[0]) - levels.rule(levels.teacher(batch[0] + 1))).pow(4).mean()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "first",
    [Drifting, Averaging, Recomputed, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())],
)
def test_modules_with_buffers_and_random_draws(first, train):
    def make(estimator):
        engine = teaching(estimator, first=first, student=chained)
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
    assert counts == {"teacher": 2 + 2 + 1 + passes, "student": 2 * 2 + 1 + 2 * passes, "rule": 2 + 2 * 2}


def labelled(levels, batch):
    return (levels.student(batch[0]) - batch[1]).square().mean()


def taught(levels, batch):
    return (levels.student(batch[0]) - levels.teacher(batch[0]) * levels.rule(batch[1]).exp()).pow(4).mean()


def by_attributes(levels, batch):
    return (levels.student(batch[0]) - levels.teacher[0].weight[0] * levels.rule[0].weight[1]).pow(4).mean()


def drawing(levels, batch):
    noise = random.random() + torch.rand(3, dtype=torch.float64)
    labels = levels.teacher(batch[0] + random.random()) + levels.rule(batch[1])
    return (levels.student(batch[0] * noise) - labels).square().mean()


class Film(nn.Linear):
    """Is told a context beforehand."""

    context = 1.0

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        return super().forward(x) * self.context


def in_context(levels, batch):
    levels.rule[0].context = levels.student(batch[1])
    labels = levels.rule(batch[0])
    levels.rule[0].context = 1.0
    return (labels - levels.teacher(batch[0])).square().mean()


class Added(nn.Linear):
    """Is told what to add beforehand."""

    context = 0.0

    def __init__(self):
        super().__init__(3, 3)

    def forward(self, x):
        return super().forward(x) + self.context


def told(levels, batch):
    """What one kept call returned goes into another one by another way than its arguments."""
    levels.rule[0].context = levels.teacher(batch[1])
    labels = levels.rule(batch[0])
    levels.rule[0].context = 0.0
    return (levels.student(batch[0]) - labels).pow(4).mean()


def keeping(levels, batch, call=lambda f, x: f(x)):
    labels = call(lambda x: levels.teacher(x).sin().exp(), batch[0])
    return (levels.student(batch[0]) - labels).pow(4).mean() + 0.1 * (levels.rule(batch[1]) - labels).square().mean()


def recomputing(levels, batch):
    return keeping(levels, batch, partial(checkpoint, use_reentrant=False))


SUM = mlo.Sum(labelled, taught)


@pytest.mark.parametrize("loss", [SUM, drawing, by_attributes, in_context, told])
def test_losses(loss):
    rule = {in_context: Film, told: Added}.get(loss)
    assert_same(lambda estimator: teaching(estimator, student=loss, rule=rule))


@pytest.mark.parametrize(
    "estimator",
    [mlo.FiniteDifference(1e-5), one_sided(radius=1e-7), mlo.Unroll(last=1, graphs=0), mlo.Unroll(last=1)],
    ids=repr,
)
def test_activations_that_a_loss_recomputes(estimator):
    """A kept call among them, given back again or made, would be taken for another part of what is recomputed."""
    found, expected = (
        flat(teaching(each, student=loss).hypergradient("rule").values())
        for each, loss in ((estimator, recomputing), (mlo.Unroll(last=1), keeping))
    )
    assert relative_error(found, expected) < 1e-6


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


def by_itself(levels, batch):
    labels = levels.teacher(batch[0])
    return (levels.student(batch[0]) - labels).pow(4).mean() + (levels.rule(labels) * levels.student(batch[1])).mean()


def mixed(levels, batch):
    return (levels.student(batch[0]) - levels.teacher(batch[0]) * levels.rule[0].weight[0]).pow(4).mean()


def following(levels, batch):
    """The argument of a call follows from the level's own weights: now the same again and now not."""
    coarse = (levels.student(batch[0]) * 50).round().detach() / 50
    labels = levels.teacher(coarse) + levels.rule(batch[0])
    return (labels * levels.student(batch[1])).pow(2).mean() + levels.student(batch[0]).square().mean()


def sloping(levels, batch):
    """By the slope of a kept call, where it has one."""
    labels = levels.teacher(batch[0])
    term = (levels.rule(labels).sin() * levels.student(batch[0])).sum()
    slope = torch.autograd.grad(term, labels, create_graph=True)[0] if labels.requires_grad else labels
    return (levels.student(batch[0]) - labels).square().mean() + slope.square().mean()


def sloping_late(levels, batch):
    return sloping(levels, batch) if levels.progress > 0.5 else chained(levels, batch)


def without_value(levels, batch):
    """A term by the slope of a kept call whose value is always zero."""
    labels = levels.teacher(batch[0])
    term, logits = levels.rule(labels).sin().sum(), levels.student(batch[0])
    slope = torch.autograd.grad(term, labels, retain_graph=True)[0] if labels.requires_grad else labels
    return (logits - labels).square().mean() + (slope * (logits - logits.detach())).mean()


def hooked(levels, batch):
    labels = levels.teacher(batch[0])
    if labels.requires_grad:
        labels.register_hook(lambda g: 0.1 * g)
    return (levels.student(batch[0]) - levels.rule(labels)).pow(4).mean() + labels.square().mean()


def at_once(levels, batch):
    return (levels.student(batch[0]) - torch.func.vmap(levels.teacher)(batch[0]) - levels.rule(batch[1])).pow(4).mean()


def judging(levels, batch):
    x, y = batch
    return (levels.teacher(x) - y).square().mean() + (levels.student(x) - y).square().mean()


def in_training(levels, batch):
    levels.student.train()
    return (levels.student(batch[0]) - levels.teacher(batch[0]) - levels.rule(batch[1])).pow(4).mean()


def switching(levels, batch):
    levels.student.eval()
    return judging(levels, batch)


def clamping(levels, batch):
    """Writes into what the student's step was given, and would be refused if it were found out at the first look."""
    return judging(levels, [x.clamp_(-1, 1) if writes else x for x in batch])


writes = []


@pytest.mark.parametrize(
    "options",
    [
        {"student": mixed},
        {"student": by_itself},
        {"student": hooked},
        {"student": following},
        {"student": writing},
        {"student": given_what_is_written_into, "rule": Doubling},
        {"student": at_once},
        {"student": recomputing},
        {"student": in_training, "judge": switching},
        {"judge": clamping},
        {"first": Listing},
        {"precision": "bf16"},
    ],
    ids=lambda options: "-".join(str(getattr(value, "__name__", value)) for value in options.values()),
)
def test_where_both_sides_are_made(options, tmp_path, monkeypatch):
    """The hypergradients are the central ones."""
    central, found = (
        teaching(estimator, teacher=mlo.FiniteDifference(), **options)
        for estimator in (mlo.FiniteDifference(), one_sided())
    )
    central.run(1, total_rounds=4, progress=False)
    central.save(tmp_path / "checkpoint")
    found.load(tmp_path / "checkpoint")
    for engine in (central, found):
        engine.run(0, progress=False)
    monkeypatch.setattr("tests.conformance.test_one_sided.writes", [True])
    for _ in range(3):
        expected = flat(central.hypergradient("rule").values())
        assert relative_error(flat(found.hypergradient("rule").values()), expected) < 1e-12
        for engine in (central, found):
            engine.run(1, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"student": mixed},
        {"student": by_itself},
        {"student": told, "rule": Added},
        {"student": recomputing},
        {"student": hooked},
        {"student": following},
        {"student": writing},
        {"student": given_what_is_written_into, "rule": Doubling},
        {"student": in_context, "rule": Film},
        {"student": sloping},
        {"student": sloping_late},
        {"student": without_value},
        {"first": Drifting},
    ],
    ids=lambda options: "-".join(value.__name__ for value in options.values()),
)
def test_the_step_is_the_same(options):
    """Whatever the loss does with what it is given."""
    engines = [teaching(estimator, **options) for estimator in (one_sided(), mlo.FirstOrder(), mlo.FiniteDifference())]
    for engine in engines:
        engine.graph["rule"].optimizer.param_groups[0]["lr"] = 0.0
        engine.run(3, total_rounds=4, progress=False)
    ends = [flat(p.detach() for level in e.graph.levels for p in level.module.parameters()) for e in engines]
    assert torch.equal(ends[0], ends[2])
    if options.get("student") not in (
        sloping,
        sloping_late,
        without_value,
        given_what_is_written_into,
    ):  # which do otherwise where there is no slope
        assert relative_error(ends[0], ends[1]) < 1e-12


@pytest.mark.parametrize("level", ["middle", "top"])
def test_nests_are_differentiated_exactly(level):
    central, found = (nest(estimator).hypergradient(level) for estimator in (mlo.FiniteDifference(), one_sided()))
    torch.testing.assert_close(found, central, rtol=0, atol=0)


@pytest.mark.parametrize(
    "estimator",
    [mlo.FiniteDifference(1e-4), one_sided(radius=1e-6), mlo.Unroll(last=1, graphs=0), mlo.Unroll(last=1)],
    ids=repr,
)
def test_calls_that_are_tied_to_the_loss_otherwise_are_made_again(estimator):
    """Differences failed there, whichever they were."""
    engine = teaching(estimator, student=in_context, rule=Film, steps=1)
    assert all(level.error < 1e-4 for level in engine.check("rule", progress=False).levels)


def now_and_then(levels, batch):
    noise = random.random() if batch[0].mean() < 0 else 0.5
    return (levels.student(batch[0] * noise) - levels.teacher(batch[0]) - levels.rule(batch[1])).pow(4).mean()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resuming_where_the_loss_draws_now_and_then(tmp_path, at):
    """What a look at the next batch tells is not what was known when the run began."""
    assert_resumes(lambda: teaching(one_sided(), student=now_and_then, steps=1), tmp_path, at=at)


def test_resuming(tmp_path):
    assert_resumes(lambda: teaching(one_sided(), first=Drifting), tmp_path)


@pytest.mark.parametrize("options", [{"rollback": True}, {"diagnostics_every": 1}, {"micro": 2}], ids=str)
def test_with_other_uses_of_the_same_solve(options):
    assert_same(lambda estimator: teaching(estimator, **options))


def test_checking():
    (level,) = teaching(one_sided(radius=1e-6, last=None)).check("rule", progress=False).levels
    assert level.error < 1e-5
    assert "with an error of order radius;" in level.claims["teacher"].text


def test_checking_what_is_computed():
    """Where the loss reads its level past the module, both sides are made in the check, too."""
    errors = [
        teaching(estimator, first=Listing).check("rule", progress=False).levels[0].error
        for estimator in (mlo.FiniteDifference(1e-4, None), one_sided(radius=1e-4, last=None))
    ]
    assert errors[0] == errors[1]
