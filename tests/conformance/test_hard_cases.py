"""Cases that once went wrong, against the same problem written another way, or against steps really repeated."""

import pytest
import torch
from torch import nn

import mlo


class Vectors(nn.Module):
    """A level whose variables are named vectors."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


def nest(estimators, losses, *, steps=(2, 2, 1), data=(None, None, None), optimizer=None, detached=()):
    modules = [Vectors(a=[0.3, 0.4], z=[0.1, 0.2]), Vectors(w=[0.5, -0.2]), Vectors(u=[1.0, 0.3])]
    optimizer = optimizer or (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    levels = [
        mlo.Problem(f"l{i}", modules[i], losses[i], optimizer(modules[i]), data[i], hypergradient=estimators[i],
                    steps=steps[i])
        for i in range(3)
    ]  # fmt: skip
    edges = [mlo.Edge("l1", "l0"), mlo.Edge("l0", "l1"), mlo.Edge("l2", "l1"), mlo.Edge("l1", "l2"), *detached]
    return mlo.Engine(mlo.Graph(levels, edges), device="cpu")


def inner(levels, batch):
    loss = ((levels.l0.a - levels.l1.w) ** 2).sum()
    return loss + ((levels.l0.z - levels.l1.w**2) ** 2).sum() if batch in (None, 1) else loss


def middle(levels, batch):
    return ((levels.l1.w - levels.l0.a - levels.l2.u) ** 2).sum() + (levels.l1.w * levels.l0.z**2).sum()


def outer(levels, batch):
    return ((levels.l1.w - 1) ** 2).sum() + 0.1 * (levels.l2.u**2).sum()


@pytest.mark.parametrize("last", [1, 2, 3, 5, 6, 9])
def test_truncation_keeps_exactly_the_last_steps(last):
    """On a quadratic with plain SGD the response to each step is known: w_k = (1 - 2 lr) w_{k-1} + 2 lr u."""
    low, up = Vectors(w=[0.0, 0.0]), Vectors(u=[1.0, 2.0])
    graph = mlo.Graph(
        [
            mlo.Problem("low", low, lambda levels, batch: ((levels.low.w - levels.up.u) ** 2).sum(),
                        torch.optim.SGD(low.parameters(), lr=0.1), None, steps=6, hypergradient=mlo.Unroll(last=last)),
            mlo.Problem("up", up, lambda levels, batch: levels.low.w.sum(),
                        torch.optim.SGD(up.parameters(), lr=0.1), None),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    found = mlo.Engine(graph, device="cpu").hypergradient("up")["u"]
    expected = 1 - 0.8 ** min(last, 6)
    torch.testing.assert_close(found, torch.full((2,), expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pattern", [[0, 1], [1, 0], [0, 0, 1, 1]])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("inside", [mlo.FirstOrder(), mlo.Unroll(), mlo.Unroll(last=1)], ids=repr)
def test_parameters_used_in_some_steps_only_and_inexact_estimators_inside(pattern, kind, inside):
    """The steps really taken, inexact hypergradients included, are what `Unroll` differentiates."""

    def optimizer(module):
        groups = [{"params": [p]} for p in module.parameters()]
        return (
            torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            if kind == "momentum"
            else torch.optim.Adam(groups, lr=0.1, eps=1e-2)
        )

    def make():
        engine = nest((inside, mlo.Unroll(), mlo.Unroll()), (inner, middle, outer), steps=(2, 1, 1),
                      data=(pattern, None, None), optimizer=optimizer)  # fmt: skip
        engine.run(1, progress=False)
        return engine

    engine = make()
    found = engine.hypergradient("l2")["u"]
    direction, radius, sides = torch.tensor([0.6, -0.8], dtype=torch.float64), 1e-6, []
    for sign in (1, -1):  # one step of the middle level: the start of its inner solve is the start of the round
        moved = make()
        with torch.no_grad():
            moved.graph["l2"].module.u.add_(direction, alpha=sign * radius)
        heard = moved.run(1, progress=False)
        sides.append(heard["l2.loss"])
    assert float(found @ direction) == pytest.approx((sides[0] - sides[1]) / (2 * radius), rel=1e-6)


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.FirstOrder()], ids=repr)
def test_a_detached_edge_is_not_differentiated_inside_a_nest(estimator):
    def reads(detach):
        def loss(levels, batch):
            scale = levels.l2.u.detach() if detach else levels.l2.u
            return ((levels.l0.a - levels.l1.w * scale) ** 2).sum() + (levels.l0.z**2).sum()

        engine = nest((estimator, mlo.Unroll(), mlo.Unroll()), (loss, middle, outer),
                      detached=[mlo.Edge("l2", "l0", detached=True)])  # fmt: skip
        return engine.hypergradient("l2")["u"]

    torch.testing.assert_close(reads(False), reads(True), rtol=1e-12, atol=1e-14)


def test_a_difference_in_a_nest_does_not_rely_on_symmetry():
    estimators = [
        (mlo.FirstOrder(), middle_one, mlo.Unroll()) for middle_one in (mlo.Unroll(), mlo.FiniteDifference(last=None))
    ]
    exact, found = (nest(e, (inner, middle, outer)).hypergradient("l2")["u"] for e in estimators)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_a_first_order_level_may_have_any_optimizer():
    engine = nest((mlo.FirstOrder(), mlo.FirstOrder(), mlo.Unroll()), (inner, middle, outer),
                  optimizer=lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01))  # fmt: skip
    engine.run(2, progress=False)
    assert (engine.hypergradient("l2")["u"] == 0.2 * engine.graph["l2"].module.u).all()


def test_clipping_in_a_nest_survives_a_gradient_that_is_zero():
    modules = (Vectors(a=[0.3]), Vectors(w=[0.5], z=[0.0]), Vectors(u=[1.0]))
    losses = (
        lambda levels, batch: ((levels.l0.a - levels.l1.w) ** 2).sum(),
        lambda levels, batch: ((levels.l1.w - levels.l0.a * levels.l2.u) ** 2).sum() + (levels.l1.z**2).sum(),
        lambda levels, batch: (levels.l1.w**2).sum(),
    )
    levels = [
        mlo.Problem(f"l{i}", m, loss, torch.optim.SGD(m.parameters(), lr=0.1), None, hypergradient=mlo.Unroll(),
                    clip_norm=0.3)
        for i, (m, loss) in enumerate(zip(modules, losses, strict=True))
    ]  # fmt: skip
    edges = [mlo.Edge("l1", "l0"), mlo.Edge("l0", "l1"), mlo.Edge("l2", "l1"), mlo.Edge("l1", "l2")]
    assert mlo.Engine(mlo.Graph(levels, edges), device="cpu").hypergradient("l2")["u"].isfinite().all()


class Box:
    def __init__(self, value):
        self.value = value


class Unboxing(nn.Linear):
    def forward(self, x):
        return super().forward(x.value if isinstance(x, Box) else x)


@pytest.mark.parametrize("way", ["sum in place", "hidden in an object"])
def test_kept_calls_never_change_the_training_step(way):
    """The same engine, with an estimator that keeps calls and with one that keeps none, takes the same steps."""

    def student_loss(levels, batch):
        if way == "sum in place":
            z = levels.teacher(batch)
            z += levels.student(batch)
            return levels.gate(z).square().mean()
        return (levels.gate(Box(levels.student(batch))) - levels.teacher(batch)).square().mean()

    found = []
    for estimator in (mlo.FiniteDifference(radius=1e-4), mlo.Unroll()):
        torch.manual_seed(0)
        teacher, student, gate = (Unboxing(3, 3).double() for _ in range(3))
        x = torch.randn(6, 3, dtype=torch.float64)
        losses = (
            lambda levels, batch: (levels.teacher(batch) - levels.gate(batch)).square().mean(),
            student_loss,
            lambda levels, batch: (levels.student(batch) - levels.teacher(batch) + 1).square().mean(),
        )
        modules = {"teacher": teacher, "student": student, "gate": gate}
        levels = [
            mlo.Problem(
                n,
                m,
                loss,
                torch.optim.SGD(m.parameters(), lr=0.3),
                [x],
                hypergradient=estimator,
                steps=1 + (n == "student"),
            )
            for (n, m), loss in zip(modules.items(), losses, strict=True)
        ]
        edges = [
            mlo.Edge("gate", "teacher"), mlo.Edge("teacher", "student"), mlo.Edge("gate", "student"),
            mlo.Edge("teacher", "gate"), mlo.Edge("student", "gate"),
        ]  # fmt: skip
        engine = mlo.Engine(mlo.Graph(levels, edges), device="cpu")
        found.append([engine.hypergradient("gate")["weight"], student.weight.detach().clone()])
        engine.run(1, progress=False)
        found[-1].append(student.weight.detach().clone())
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-12, atol=1e-14)


def test_a_foreign_module_used_without_an_edge_is_refused():
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    graph = mlo.Graph(
        [
            mlo.Problem("teacher", teacher, lambda levels, batch: levels.teacher(batch).sum(),
                        torch.optim.SGD(teacher.parameters(), lr=0.1), [torch.ones(1, 2)]),
            mlo.Problem("student", student,
                        lambda levels, batch: (levels.student(teacher(batch)) + levels.teacher(batch)).sum(),
                        torch.optim.SGD(student.parameters(), lr=0.1), [torch.ones(1, 2)]),
        ],
        [mlo.Edge("teacher", "student")],
    )  # fmt: skip
    mlo.Engine(graph, device="cpu").run(1, progress=False)  # with an edge, a second way to the module is the user's own
    other = mlo.Graph(
        [
            mlo.Problem("student", student, lambda levels, batch: levels.student(teacher(batch)).sum(),
                        torch.optim.SGD(student.parameters(), lr=0.1), [torch.ones(1, 2)]),
            mlo.Problem("teacher", teacher, lambda levels, batch: (levels.teacher(batch) + levels.student(batch)).sum(),
                        torch.optim.SGD(teacher.parameters(), lr=0.1), [torch.ones(1, 2)]),
        ],
        [mlo.Edge("student", "teacher")],
    )  # fmt: skip
    with pytest.raises(
        mlo.GraphError, match=r"level 'student' depends on the variables of level 'teacher' without an edge"
    ):
        mlo.Engine(other, device="cpu").run(1, progress=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(mode):
    make = [nest((mlo.Unroll(),) * 3, (inner, middle, outer)) for _ in range(2)]
    expected = make[0].hypergradient("l2")["u"]
    with mode():
        found = make[1].hypergradient("l2")["u"]
        make[1].run(1, progress=False)
    make[0].run(1, progress=False)
    assert torch.equal(found.clone(), expected)
    assert torch.equal(make[0].graph["l1"].module.w, make[1].graph["l1"].module.w)
