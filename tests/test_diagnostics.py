"""How far the estimators in use are from the exact derivative, as metrics."""

import pytest
import torch

import mlo
from tests.conformance.quadratics import oracle, quadratic_engine
from tests.conformance.random_graphs import draw_graph, flat
from tests.toys import Centred, assert_same_state, state_of, three_levels


def played(engine, rounds=1):
    """The metrics of each round."""
    seen = []

    class Keep:
        def on_round(self, report):
            seen.append(report.metrics)

    engine.run(rounds, progress=False, callbacks=[Keep()])
    return seen


def test_off_by_default():
    assert not [name for metrics in played(three_levels()) for name in metrics if "hypergradient" in name]


@pytest.mark.parametrize("rollback", [False, True])
def test_nothing_else_changes(rollback):
    plain = three_levels(rollback=rollback)
    told = three_levels(rollback=rollback, diagnostics_every=2)
    a, b = played(plain, 3), played(told, 3)
    assert_same_state(state_of(plain), state_of(told))
    assert ["gate.hypergradient_cosine" in metrics for metrics in b] == [True, False, True]
    for one, other in zip(a, b, strict=True):
        shared = set(one) - {"round_seconds"}
        assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


@pytest.mark.parametrize("estimator", [mlo.SAMA(), mlo.Unroll(last=1)], ids=repr)
def test_the_figures_are_those_of_the_two_hypergradients(estimator):
    used, exact = three_levels(estimator=estimator, steps=3), three_levels(estimator=mlo.Unroll(), steps=3)
    a, b = (flat(engine.hypergradient("gate").values()).double() for engine in (used, exact))
    found = played(three_levels(estimator=estimator, steps=3, diagnostics_every=1))[0]
    assert found["gate.hypergradient_cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert found["gate.hypergradient_error"] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)
    assert found["gate.hypergradient_error"] > 1e-3


def test_a_hypergradient_of_zero_has_no_direction():
    found = played(three_levels(estimator=mlo.FirstOrder(), steps=3, diagnostics_every=1))[0]
    assert found["gate.hypergradient_cosine"] == 0
    assert found["gate.hypergradient_error"] == 1


def test_exact_estimators_are_found_exact():
    for estimator in (mlo.Unroll(), mlo.Unroll(checkpoint=True)):
        found = played(three_levels(estimator=estimator, steps=3, diagnostics_every=1))[0]
        assert found["gate.hypergradient_cosine"] == pytest.approx(1, abs=1e-6)
        assert found["gate.hypergradient_error"] < 1e-4  # float32


@pytest.mark.parametrize("seed", range(4))
def test_a_nest_reports_the_symmetry_of_its_curvature(seed):
    graph = draw_graph(seed, 3, nested=True)
    middle = next(name for name in graph.names if graph.engine(mlo.Unroll()).graph.inside(name) and name != "level2")
    found = played(graph.engine(mlo.Unroll(), diagnostics_every=1))[0]
    assert found[f"{middle}.hessian_asymmetry"] < 1e-9
    assert found["level2.hypergradient_error"] < 1e-9
    assert found[f"{middle}.hypergradient_error"] < 1e-9


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_nest_of_recomputed_steps(steps):
    """Whose last step may be one of those that are left out."""
    graph = draw_graph(0, 3, nested=True)
    graph.steps = dict.fromkeys(graph.names, steps)
    plain, thin = (
        played(graph.engine(mlo.Unroll(checkpoint=checkpoint), diagnostics_every=1))[0] for checkpoint in (False, True)
    )
    names = [name for name in plain if "hessian_asymmetry" in name]
    assert names
    assert [thin[name] for name in names] == pytest.approx([plain[name] for name in names], abs=1e-9)
    assert all(check.passed for check in [graph.engine(mlo.Unroll(checkpoint=True)).check(progress=False)])


@pytest.mark.parametrize(
    ("estimator", "symmetric"), [(mlo.Unroll(last=1), False), (mlo.Neumann(terms=1, scale=0.3), True)]
)
def test_what_makes_the_curvature_asymmetric(estimator, symmetric):
    """Steps that move by more than their pullback says do; an implicit response moves by its own pullback."""
    data = oracle("trilevel_nest_implicit")
    engine = quadratic_engine(
        data, estimator, lambda _, m: torch.optim.SGD(m.parameters(), lr=0.4), 3, diagnostics_every=1
    )
    found = played(engine)[0]["l1.hessian_asymmetry"]
    assert found < 1e-9 if symmetric else found > 1e-2


def test_mistakes():
    for interval in (0, -1, 1.5, True):
        with pytest.raises(mlo.MloError, match="diagnostics_every: expected a whole number of at least 1, or None"):
            three_levels(diagnostics_every=interval)
    lower, upper = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def loss(levels, batch):
        return (levels.lower.weight - levels.upper.weight).square().sum()

    graph = mlo.Graph(
        [
            mlo.Problem("lower", lower, loss, torch.optim.RMSprop(lower.parameters()), None,
                        hypergradient=mlo.ConjugateGradient()),
            mlo.Problem("upper", upper, loss, torch.optim.RMSprop(upper.parameters()), None),
        ],
        [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
    )  # fmt: skip
    mlo.Engine(graph, device="cpu").run(1, progress=False)
    with pytest.raises(mlo.GraphError, match="found RMSprop in level 'lower'"):
        mlo.Engine(graph, device="cpu", diagnostics_every=1)


@pytest.mark.filterwarnings("ignore:level .* Neumann. the terms of the series grow")
def test_an_implicit_estimator_further_inside_a_nest_is_measured_by_its_steps():
    """Its linear solve counts as exact, and so the black box finds a little less."""
    graph = draw_graph(0, 3, nested=True)
    middle = next(name for name in graph.names if graph.engine(mlo.Unroll()).graph.inside(name))
    inner = mlo.Neumann(terms=3, scale=0.1)
    estimators = {name: mlo.Unroll() if name == middle else inner for name in graph.names}
    engine = graph.engine(estimators, diagnostics_every=1)
    checked = engine.check("level2", directions=20, progress=False).levels[0].error
    assert played(engine)[0]["level2.hypergradient_error"] == pytest.approx(checked, rel=0.2)
    assert checked > 1e-4


@pytest.mark.parametrize("estimator", [mlo.SAMA(), mlo.Unroll(last=1), mlo.Unroll(last=2, checkpoint=True)], ids=repr)
def test_a_step_that_fp16_skips_is_not_the_last_one_taken(estimator):
    """With and without diagnostics, for which all steps are recorded."""

    def weights(**options):
        torch.manual_seed(0)
        lower, upper = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        batches = [torch.ones(1, 2), torch.ones(1, 2), torch.full((1, 2), 60.0)]  # its scaled gradient overflows

        def loss(levels, batch):
            return (levels.lower(batch) - levels.upper(batch)).square().mean()

        problems = [
            mlo.Problem("lower", lower, loss, torch.optim.SGD(lower.parameters(), lr=0.1), batches,
                        hypergradient=estimator, steps=3),
            mlo.Problem("upper", upper, lambda levels, batch: levels.lower(batch).square().mean(),
                        torch.optim.SGD(upper.parameters(), lr=0.1), [torch.ones(1, 2)]),
        ]  # fmt: skip
        edges = [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]
        engine = mlo.Engine(mlo.Graph(problems, edges), device="cpu", precision="fp16", **options)
        before = upper.weight.detach().clone()
        engine.run(1, progress=False)
        assert engine._states["lower"].steps_taken == 2
        return before, upper.weight.detach().clone()

    before, plain = weights()
    assert not torch.equal(before, plain)
    assert torch.equal(plain, weights(diagnostics_every=1)[1])


def test_buffers_are_as_the_step_finds_them():
    torch.manual_seed(0)
    low, up, x = torch.nn.Linear(3, 3).double(), Centred().double(), torch.randn(5, 3, dtype=torch.float64) + 2

    def problem(name, module, loss, **options):
        return mlo.Problem(name, module, loss, torch.optim.SGD(module.parameters(), lr=0.1), [x], **options)

    levels = [
        problem("low", low, lambda levels, batch: (levels.up(batch) - levels.low(batch)).square().mean(),
                hypergradient=mlo.Unroll(), steps=2),
        problem("up", up, lambda levels, batch: (levels.up(batch) * levels.low(batch) - 1).square().mean()),
    ]  # fmt: skip
    edges = [mlo.Edge("up", "low"), mlo.Edge("low", "up")]
    (metrics,) = played(mlo.Engine(mlo.Graph(levels, edges), device="cpu", diagnostics_every=1))
    assert metrics["up.hypergradient_error"] < 1e-12
