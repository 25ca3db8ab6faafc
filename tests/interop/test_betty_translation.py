"""What Betty cannot express is refused at once, all of it, with or without Betty."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader

import mlo
from mlo.errors import InteropError
from mlo.interop.betty import betty_engine, check_betty
from mlo.interop.betty_schedule import find_dependencies, find_schedule
from mlo.interop.betty_translation import Options, translate

from .graphs import bilevel, nest, networks, sgd, siblings, teaching, vector

CPU = Options(torch.device("cpu"))


def refused(graph, **options):
    """The lines of the refusal, without the title."""
    with pytest.raises(InteropError) as caught:
        check_betty(graph, device="cpu", **options)
    title, *lines = str(caught.value).splitlines()
    assert title == "Betty cannot express what this graph asks of it:"
    return [line.removeprefix("  - ") for line in lines]


def changed(graph, name, **changes):
    return mlo.Graph([dataclasses.replace(p, **changes) if p.name == name else p for p in graph.levels], graph.edges)


class Own(mlo.FiniteDifference):
    """An estimator that a user wrote."""


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.Nystrom(), mlo.Penalty(), Own()], ids=repr)
def test_estimators_that_betty_lacks(estimator):
    (line,) = refused(bilevel(estimator))
    assert line.startswith(f"level 'w', {estimator!r}: Betty has no such estimator. Choose mlo.FiniteDifference(), ")
    assert line.endswith("--set levels.w.hypergradient.kind=finite_difference.")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (mlo.FiniteDifference(one_sided=True), "Betty takes central differences. Set one_sided=False."),
        (mlo.FiniteDifference(last=2), "Betty goes back one step, not 2 of 3. Set last=1."),
        (mlo.FiniteDifference(last=None), "Betty goes back one step, not all of 3. Set last=1."),
        (mlo.Neumann(), "Betty does not find the scale itself. Give it, as in mlo.Neumann(scale=0.1)."),
        (mlo.Neumann(scale=0.1, warm_start=True), "Betty has no warm start. Set warm_start=False."),
        (
            mlo.ConjugateGradient(damping=0.1),
            "Betty has no damping. Set damping=0, or add the damping as a penalty to the loss.",
        ),
        (mlo.ConjugateGradient(preconditioner=tuple), "Betty has no preconditioner. Leave it out."),
        (mlo.ConjugateGradient(warm_start=True), "Betty has no warm start. Set warm_start=False."),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_settings_of_estimators(estimator, expected):
    assert refused(bilevel(estimator, steps=3)) == [f"level 'w', {estimator!r}: {expected}"]


def test_estimators_in_betty_s_terms():
    def settings(estimator, **options):
        found = dict(translate(bilevel(estimator, **options), CPU).settings["w"])
        return {key: value for key, value in found.items() if key.partition("_")[0] in (*"ab", "type", found["type"])}

    assert settings(mlo.FiniteDifference(0.02, last=None)) == {"type": "darts", "darts_alpha": 0.02}
    assert settings(mlo.FiniteDifference(0.02), steps=3) == {"type": "darts", "darts_alpha": 0.02}
    assert settings(mlo.SAMA(0.03)) == {"type": "sama", "sama_adam_alpha": 0.03}
    neumann = {"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.2}
    assert settings(mlo.Neumann(terms=4, scale=0.2)) == neumann
    assert settings(mlo.ConjugateGradient(7)) == {"type": "cg", "cg_iterations": 7, "cg_alpha": 1.0}


def test_everything_that_cannot_be_is_named_at_once():
    graph = changed(networks(mlo.Unroll(), teacher_steps=2, micro_batches=2), "student", steps=3)
    lines = refused(graph, rollback=True, precision="bf16", diagnostics_every=5)
    starts = [line.partition(":")[0] for line in lines]
    assert starts == [
        "level 'teacher', micro_batches=2 with a scheduler",
        "level 'teacher', Unroll(last=None, checkpoint=False, graphs=1)",
        "level 'student', Unroll(last=None, checkpoint=False, graphs=1)",
        "steps of 'student'",
        "precision 'bf16' on device 'cpu'",
        "diagnostics_every=5",
        "rollback, level 'teacher' with 2 steps of 2 micro-batches",
        "rollback, level 'student' with 3 steps of 1 micro-batches",
    ]


@pytest.mark.parametrize("estimator", [mlo.ConjugateGradient(), mlo.Neumann(scale=0.1)], ids=repr)
def test_implicit_estimators_of_middle_levels(estimator):
    (line,) = refused(nest(estimator))
    assert line.startswith(f"level 'l1', {estimator!r}: Betty refuses it for a level with levels solved inside it")


def test_starts_and_hyperparameters():
    graph = bilevel(mlo.FirstOrder())
    assert refused(changed(graph, "w", start="a")) == [
        "level 'w', start: Betty's levels always go on from where they are. Leave start out."
    ]
    with_rate = changed(graph, "w", hyperparameters={"lr": lambda levels: levels.a.w[0].exp()})
    assert refused(with_rate) == [
        "level 'w', hyperparameters lr: Betty reads no option of an optimizer from a level. Fix the options."
    ]


def test_optimizers():
    class PlainRMSprop(torch.optim.SGD):
        pass

    mlo.register_optimizer(PlainRMSprop, lambda w, g, state, options: (w - options["lr"] * g, {}))
    (line,) = refused(bilevel(mlo.SAMA(), optimizer=lambda module: PlainRMSprop(module.parameters(), lr=0.1)))
    assert line.startswith("level 'w', SAMA(radius=0.01): Betty's SAMA raises NotImplementedError with RMSprop.")
    graph = networks(mlo.FiniteDifference())
    student = graph["student"].module
    partly = changed(graph, "student", optimizer=torch.optim.SGD(student[0].parameters(), lr=0.1))
    (line,) = refused(partly)
    assert line.startswith("level 'student', optimizer: it does not hold 1.weight, 1.bias, 5.weight, 5.bias, which")


def test_micro_batches_of_levels_that_read_others():
    (line,) = refused(changed(networks(mlo.FirstOrder()), "gate", micro_batches=2))
    assert line.startswith("level 'gate', micro_batches=2: Betty takes the steps of the levels below")


def test_warm_ups():
    found = translate(networks(mlo.FirstOrder(), teacher_steps=3, warmup_rounds=2), CPU)
    assert not found.obstacles
    assert {name: own["warmup_steps"] for name, own in found.settings.items()} == {
        "teacher": 0,
        "student": 2,
        "gate": 0,
    }
    nobody = mlo.Graph([changed(bilevel(mlo.FirstOrder()), "a", warmup_rounds=2)["a"]])
    (line,) = refused(nobody)
    assert line.startswith("level 'a', warmup_rounds: Betty makes the level above wait by a level that nobody else")
    chain = mlo.Graph(
        [*changed(bilevel(mlo.FirstOrder()), "a", warmup_rounds=2).levels, _reader("reader", "a")],
        [mlo.Edge("a", "w"), mlo.Edge("w", "a"), mlo.Edge("a", "reader")],
    )
    (line,) = refused(chain)
    assert line.startswith("level 'a', warmup_rounds: in Betty the levels that read it ('reader') wait as long")
    lines = refused(networks(mlo.FirstOrder(), warmup_rounds=2), rollback=True)
    assert [line.partition(":")[0] for line in lines] == ["rollback, level 'gate' with warmup_rounds=2"]


def test_rollbacks_of_nests():
    (line,) = refused(nest(mlo.FirstOrder()), rollback=True)
    assert line.startswith("rollback, level 'l2', with levels solved inside levels inside it: Betty rolls back once")


def _reader(name, source):
    """A level that reads another one, and is read by none."""
    module = vector(50)

    def loss(levels, batch):
        return (getattr(levels, name)() - getattr(levels, source)()).square().sum()

    return mlo.Problem(name, module, loss, sgd(module), None)


def test_rollbacks_of_levels_that_others_read():
    """Betty puts back every level that is read from above, after the normal steps of all; here only those inside."""
    pair = bilevel(mlo.FirstOrder())
    edges = [mlo.Edge("a", "w"), mlo.Edge("w", "a")]
    (line,) = refused(
        mlo.Graph([*pair.levels, _reader("reader", "w")], [*edges, mlo.Edge("w", "reader")]), rollback=True
    )
    assert line.startswith(
        "rollback, level 'w', which 'reader' reads without being solved around it: Betty steps 'reader' before it puts"
    )
    detached = mlo.Graph(pair.levels, [mlo.Edge("a", "w", detached=True), mlo.Edge("w", "a")])
    (line,) = refused(detached, rollback=True)
    assert line.startswith("rollback, level 'w', which 'a' reads without being solved around it")
    (line,) = refused(siblings(), rollback=True)
    assert line.startswith("rollback with levels 'one' and 'two': where several levels read nothing from below, Betty")
    assert not translate(teaching(mlo.FirstOrder()), dataclasses.replace(CPU, rollback=True)).obstacles


def test_rollback_of_a_level_that_reads_a_higher_one_beside_it():
    modules = {name: vector(i) for i, name in enumerate(("low", "middle", "top"))}
    reads = {"low": ["top", "middle"], "middle": ["low"], "top": ["low", "middle"]}

    def problem(name):
        def loss(levels, batch):
            return sum((getattr(levels, n)() - getattr(levels, name)()).square().sum() for n in reads[name])

        return mlo.Problem(name, modules[name], loss, sgd(modules[name]), None, hypergradient=mlo.FirstOrder())

    edges = [mlo.Edge(s, t, detached=(s, t) == ("middle", "low")) for t, sources in reads.items() for s in sources]
    (line,) = refused(mlo.Graph([problem(name) for name in reads], edges), rollback=True)
    assert line.startswith(
        "rollback, level 'low', which reads 'middle' without being solved in it: Betty steps 'low' ag"
    )


def test_optimizers_that_ascend():
    def ascending(module):
        return torch.optim.SGD(module.parameters(), lr=0.1, maximize=True)

    for estimator in (mlo.FiniteDifference(), mlo.SAMA(), mlo.Neumann(scale=0.1)):
        (line,) = refused(bilevel(estimator, optimizer=ascending))
        assert line.endswith("Betty differentiates a step downhill. Negate the loss, and leave maximize out.")
    for estimator in (mlo.FirstOrder(), mlo.ConjugateGradient()):
        assert not translate(bilevel(estimator, optimizer=ascending), CPU).obstacles


def test_data_that_draws_from_one_generator():
    generator = torch.Generator()
    data = [DataLoader([torch.zeros(1)], shuffle=True, generator=generator) for _ in range(2)]
    graph = changed(changed(bilevel(mlo.FirstOrder()), "w", data=data[0]), "a", data=data[1])
    (line,) = refused(graph)
    assert line.startswith("data of levels 'w' and 'a': both draw from one generator, and Betty begins")


@pytest.mark.parametrize(
    ("graph", "line"),
    [
        (
            lambda: teaching(mlo.FiniteDifference(), student_steps=2),
            "steps of 's': in a round Betty takes other numbers of steps, 2 of 't' where the graph takes 1",
        ),
        (lambda: siblings(steps=(2, 3)), "steps of 'one' and 'two': in a round Betty takes other numbers of steps, "),
    ],
    ids=["teaching", "siblings"],
)
def test_steps_that_betty_would_take_otherwise(graph, line):
    (found,) = refused(graph())
    assert found.startswith(line)
    assert found.endswith(("Set steps=1 of 's'.", "Give 'one' and 'two' equal steps."))


def test_responses_to_higher_levels_inside_the_same_one():
    """The lowest level responds to the middle one, which is not solved around it."""
    modules = {name: vector(i) for i, name in enumerate(("low", "middle", "top"))}
    reads = {"low": ["middle"], "middle": ["top"], "top": ["low"]}

    def problem(name):
        def loss(levels, batch):
            return sum((getattr(levels, n)() - 1).square().sum() for n in (name, *reads[name]))

        return mlo.Problem(name, modules[name], loss, sgd(modules[name]), None)

    edges = [mlo.Edge(source, target) for target, sources in reads.items() for source in sources]
    lines = refused(mlo.Graph([problem(name) for name in ("low", "middle", "top")], edges))
    assert [line.partition(":")[0] for line in lines if line.startswith("edge")] == [
        "edge 'middle' -> 'low'",
        "edge 'top' -> 'middle'",
    ]
    assert not translate(mlo.Graph([problem(name) for name in ("middle", "low", "top")], edges), CPU).obstacles


def test_dependencies_of_learning_by_teaching():
    found = find_dependencies(teaching(mlo.FiniteDifference()))
    assert found.parents == {"t": ("s", "a"), "s": ("a",), "a": ()}
    assert found.lowers == {"t": (), "s": (), "a": ("t",)}
    assert found.children == {"t": (), "s": ("t",), "a": ("t", "s")}
    assert found.lost == ()


@pytest.mark.parametrize(
    ("graph", "iterations"),
    [
        (lambda: bilevel(mlo.FirstOrder(), steps=3), 3),
        (lambda: teaching(mlo.FirstOrder(), teacher_steps=2), 2),
        (lambda: nest(mlo.FirstOrder(), steps=(2, 3, 2)), 12),
        (lambda: siblings(steps=(2, 2)), 2),
        (lambda: networks(mlo.FirstOrder(), micro_batches=3, scheduled=False), 3),
    ],
    ids=["bilevel", "teaching", "nest", "siblings", "micro-batches"],
)
def test_a_round_in_iterations_of_betty_s_engine(graph, iterations):
    built = graph()
    schedule = find_schedule(built, find_dependencies(built))
    assert schedule.agrees
    assert schedule.iterations == iterations


def test_a_missing_betty_is_said_with_the_command_that_installs_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "betty" else find_spec(name))
    with pytest.raises(InteropError, match="found no module betty") as caught:
        betty_engine(bilevel(mlo.FirstOrder()), rounds=1, device="cpu")
    assert "pip install --no-deps --ignore-requires-python betty-ml==0.2.1" in str(caught.value)


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        ([], {}, "graph: expected an mlo.Graph"),
        (bilevel(mlo.FirstOrder()), {"rollback": "no"}, "rollback: expected True or False; found 'no'"),
    ],
    ids=["graph", "rollback"],
)
def test_arguments_are_checked_as_the_engine_does(graph, options, message):
    with pytest.raises(mlo.MloError, match=message):
        check_betty(graph, device="cpu", **options)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr("mlo.interop.betty.whole_world", object)
    with pytest.raises(InteropError, match="Betty's engine: expected a single process"):
        betty_engine(bilevel(mlo.FirstOrder()), rounds=1, device="cpu")


def test_an_unknown_precision():
    with pytest.raises(mlo.MloError, match="precision: expected one of fp32, bf16, fp16; found 'fp8'"):
        check_betty(bilevel(mlo.FirstOrder()), device="cpu", precision="fp8")


def test_it_is_an_error_of_ours():
    assert issubclass(InteropError, mlo.MloError)
