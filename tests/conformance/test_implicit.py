"""The implicit estimators: exact where the lower levels have converged, at any depth."""

import pytest
import torch

import mlo
from mlo.linear_solvers import conjugate_gradient

from .closed_form import GRAPHS, draw
from .quadratics import Vector, oracle, quadratic_engine, relative_error

ESTIMATORS = {
    "cg": mlo.ConjugateGradient(tolerance=1e-12),
    "neumann": mlo.Neumann(terms=60),
    "nystrom": mlo.Nystrom(rank=1000, damping=1e-10),
}
ORACLES = [
    ("bilevel_implicit", 120, 0.4),
    ("lbt_implicit", 120, 0.4),
    ("fourlevel_diamond_implicit", 120, 0.4),
    ("trilevel_nest_implicit", 25, 0.62),
]


def sgd(_, module, **options):
    return torch.optim.SGD(module.parameters(), lr=0.1, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(("name", "steps", "rate"), ORACLES, ids=[name for name, *_ in ORACLES])
def test_oracles(name, steps, rate, estimator):
    data = oracle(name)
    engine = quadratic_engine(data, estimator, lambda _, m: torch.optim.SGD(m.parameters(), lr=rate), steps)
    upper = f"l{data['upper']}"
    assert relative_error(engine.hypergradient(upper)["w"], data["hypergradient"]) < 1e-8


def test_penalty_on_the_oracles():
    for name, enough, rate in ORACLES:
        data = oracle(name)
        steps = 12 if name == "trilevel_nest_implicit" else enough  # every step of the middle level re-solves
        engine = quadratic_engine(data, mlo.Penalty(steps=steps), sgd_of(rate), steps)
        assert relative_error(engine.hypergradient(f"l{data['upper']}")["w"], data["hypergradient"]) < 1e-4


def test_nystrom_needs_no_damping_at_full_rank():
    data = oracle("bilevel_implicit")
    full, low = (quadratic_engine(data, mlo.Nystrom(rank=rank, damping=0), sgd_of(0.4), 120) for rank in (1000, 2))
    assert relative_error(full.hypergradient("l1")["w"], data["hypergradient"]) < 1e-9
    with pytest.raises(mlo.MloError, match=r"level 'l0', Nystrom: expected a positive damping.*rank 2 of \d"):
        low.hypergradient("l1")


def sgd_of(rate):
    return lambda _, module: torch.optim.SGD(module.parameters(), lr=rate)


CASES = [
    (shape, kind, decay)
    for shape in GRAPHS
    for kind in (*ESTIMATORS, "mixed")
    for decay in (0.0, 0.3)
    if (shape, kind) != ("nest in a nest", "neumann")  # each nest multiplies: 80 * 80 * 80 products
]


@pytest.mark.parametrize(("shape", "kind", "decay"), CASES)
def test_graphs_of_any_shape(shape, kind, decay):
    """Also with levels that differentiate differently from each other."""
    reads = GRAPHS[shape]
    top, dims = max(reads), [3, 2, 2, 2, 2][: len(reads)]
    form = draw(1, dims, reads, decay)
    kinds = list(ESTIMATORS) if kind == "mixed" else [kind]
    estimators = [ESTIMATORS[kinds[p % len(kinds)]] for p in reads]
    w = form.solution(torch.randn(sum(dims), dtype=torch.float64, generator=torch.Generator().manual_seed(2)), top)
    engine = form.engine(w, estimators, lambda p, m: sgd(p, m, weight_decay=decay))
    found = engine.hypergradient(f"l{top}")["w"]
    assert relative_error(found, form.hypergradient(w, top)) < 1e-8
    for p in form.inside(top):  # a middle level is an upper level too
        if form.inside(p):
            resting = engine.hypergradient(f"l{p}")["w"] + decay * w[form.block(p)]
            assert resting.abs().max() < 1e-8


OPTIMIZERS = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.2),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.2),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.2, eps=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, weight_decay=0.2, eps=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_optimizer_only_decides_where_the_level_comes_to_rest(estimator, optimizer):
    reads = GRAPHS["lbt"]
    form = draw(3, [3, 2, 2], reads, 0.2)
    w = form.solution(torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 2)
    engine = form.engine(w, [estimator] * 3, lambda _, m: OPTIMIZERS[optimizer](m))
    assert relative_error(engine.hypergradient("l2")["w"], form.hypergradient(w, 2)) < 1e-7


def test_maximizing_levels():
    form = draw(3, [3, 2], {0: {1}, 1: {0}}, 0.2)
    w = form.solution(torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), 1)
    negative = draw(3, [3, 2], {0: {1}, 1: {0}}, 0.2)
    negative.q[0], negative.b[0] = -negative.q[0], -negative.b[0]
    engine = negative.engine(w, [ESTIMATORS["cg"]] * 2, lambda p, m: sgd(p, m, weight_decay=0.2, maximize=p == 0))
    assert relative_error(engine.hypergradient("l1")["w"], form.hypergradient(w, 1)) < 1e-8


class Groups(torch.nn.Module):
    """A used, a second used, an unused and a frozen parameter, and one that the optimizer does not hold."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("a", "b", "unused", "frozen", "fixed"):
            value = torch.randn(3, dtype=torch.float64, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=name != "frozen"))


def groups_engine(estimator, steps=400):
    lower, upper = Groups(), torch.nn.ParameterList([torch.ones(3, dtype=torch.float64)])

    def fit(levels, batch):
        m, u = levels.lower, levels.upper[0]
        return ((m.a - u * m.fixed + m.frozen) ** 2).sum() + (m.b * m.a - u).square().sum() + 0.1 * m.b.square().sum()

    def score(levels, batch):
        m = levels.lower
        return (m.a * m.b).sum() + (m.unused**2).sum() * levels.upper[0].sum() + m.fixed.sum()

    sgd = torch.optim.SGD(
        [
            {"params": [lower.a], "lr": 0.02, "weight_decay": 0.1},
            {"params": [lower.b, lower.unused], "lr": 0.05, "momentum": 0.5},
        ],
        lr=0.1,
    )
    return mlo.Engine(
        mlo.Graph(
            [
                mlo.Problem("lower", lower, fit, sgd, None, hypergradient=estimator, steps=steps),
                mlo.Problem("upper", upper, score, torch.optim.Adam(upper.parameters()), None),
            ],
            [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
        ),
        device="cpu",
    )


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_parameter_groups_and_parameters_that_take_no_part(estimator):
    if isinstance(estimator, mlo.Neumann):
        estimator = mlo.Neumann(terms=500)
    exact = groups_engine(mlo.Unroll()).hypergradient("upper")["0"]
    assert relative_error(groups_engine(estimator).hypergradient("upper")["0"], exact) < 1e-7


def tanh_engine(estimator, steps=1, seed=0, **options):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    decay = torch.nn.ParameterList([torch.full((2,), -1.0, dtype=torch.float64)])
    x = torch.randn(12, 3, dtype=torch.float64)
    data = [(x[:6], x[:6].sum(1, keepdim=True)), (x[6:], x[6:].prod(1, keepdim=True))]

    def fit(levels, batch):
        penalties = sum(levels.decay[0].exp()[i] * levels.net[2 * i].weight.square().sum() for i in range(2))
        return (levels.net(batch[0]) - batch[1]).square().mean() + penalties

    def score(levels, batch):
        return (levels.net(batch[0]) - batch[1]).square().mean()

    return mlo.Engine(
        mlo.Graph(
            [
                mlo.Problem("net", net, fit, torch.optim.SGD(net.parameters(), lr=0.1), data, steps=steps,
                            hypergradient=estimator),
                mlo.Problem("decay", decay, score, torch.optim.SGD(decay.parameters(), lr=0.1), data[::-1]),
            ],
            [mlo.Edge("decay", "net"), mlo.Edge("net", "decay")],
        ),
        device="cpu",
        **options,
    )  # fmt: skip


def test_one_neumann_term_is_the_last_step_of_an_unroll():
    """At the weights, batch and draws of the step, whatever the network."""
    exact = tanh_engine(mlo.Unroll(last=1), steps=3).hypergradient("decay")["0"]
    found = tanh_engine(mlo.Neumann(terms=1, scale=0.1), steps=3).hypergradient("decay")["0"]
    assert relative_error(found, exact) < 1e-12


def test_neumann_terms_are_an_unroll_at_the_converged_weights():
    """Unrolling K steps from the optimum and K terms of the series are the same polynomial of H."""
    data = oracle("bilevel_implicit")
    found, exact = [], []
    for estimator in (mlo.Neumann(terms=5, scale=0.3), mlo.Unroll(last=5)):
        engine = quadratic_engine(data, estimator, lambda _, m: torch.optim.SGD(m.parameters(), lr=0.3), 90)
        (found if isinstance(estimator, mlo.Neumann) else exact).append(engine.hypergradient("l1")["w"])
    assert relative_error(found[0], exact[0]) < 1e-10


def test_unrolling_tends_to_the_implicit_gradient_as_steps_grow():
    data = oracle("lbt_implicit")
    errors = []
    for steps in (5, 15, 45):
        engine = quadratic_engine(data, mlo.Unroll(), lambda _, m: torch.optim.SGD(m.parameters(), lr=0.4), steps)
        errors.append(relative_error(engine.hypergradient("l2")["w"], data["hypergradient"]))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize(
    "estimator",
    [mlo.ConjugateGradient(iterations=1, tolerance=1e-10, warm_start=True), mlo.Neumann(terms=1, warm_start=True)],
    ids=lambda e: type(e).__name__,
)
def test_warm_starts_carry_the_solution_from_round_to_round(estimator):
    """While the upper level stands still, one iteration a round comes to the exact solution."""
    data = oracle("bilevel_implicit")
    rates = [0.4, 0.0]
    engine = quadratic_engine(data, estimator, lambda i, m: torch.optim.SGD(m.parameters(), lr=rates[i]), 1)
    engine.run(1, progress=False)
    early = relative_error(engine.hypergradient("l1")["w"], data["hypergradient"])
    engine.run(150, progress=False)
    late = relative_error(engine.hypergradient("l1")["w"], data["hypergradient"])
    assert early > 1e-2
    assert late < 1e-8


@pytest.mark.parametrize(
    "estimator",
    [
        mlo.ConjugateGradient(iterations=2, damping=5.0, warm_start=True),
        mlo.Neumann(terms=1, warm_start=True),
        mlo.Nystrom(rank=3, damping=1.0),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_an_estimator_remembers_is_saved_and_queries_leave_it_alone(estimator, tmp_path):
    whole = tanh_engine(estimator, steps=2)
    whole.run(6, progress=False)
    half = tanh_engine(estimator, steps=2)
    half.run(3, total_rounds=6, progress=False)
    half.hypergradient("decay")
    half.save(tmp_path / "half.pt")
    resumed = tanh_engine(estimator, steps=2, seed=5)
    resumed.graph["net"].data[:] = half.graph["net"].data
    resumed.graph["decay"].data[:] = half.graph["decay"].data
    resumed.load(tmp_path / "half.pt")
    resumed.run(3, progress=False)
    for name in ("net", "decay"):
        for a, b in zip(whole.graph[name].module.parameters(), resumed.graph[name].module.parameters(), strict=True):
            assert torch.equal(a, b)


def test_figures_are_reported():
    engine = tanh_engine(mlo.ConjugateGradient(iterations=3, damping=5.0, tolerance=0))
    metrics = engine.run(1, progress=False)
    assert metrics["net.cg_iterations"] == 3
    assert 0 < metrics["net.cg_residual"] < 1
    assert metrics["net.cg_negative_curvature"] == 0
    with pytest.warns(RuntimeWarning, match="take fewer terms, as H seems to have negative eigenvalues"):
        metrics = tanh_engine(mlo.Neumann(terms=3)).run(1, progress=False)
    assert {"net.neumann_residual", "net.neumann_growth", "net.neumann_scale"} <= metrics.keys()
    metrics = tanh_engine(mlo.Nystrom(rank=30)).run(1, progress=False)
    assert metrics["net.nystrom_negative_eigenvalues"] > 0  # a random network is at no minimum


def test_a_diverging_series_is_never_silent():
    with pytest.warns(RuntimeWarning, match="level 'net', Neumann: the terms of the series grow .*scale='auto'"):
        tanh_engine(mlo.Neumann(terms=3, scale=2.0)).run(1, progress=False)
    with pytest.raises(mlo.DivergenceError, match="Lower the scale: choose scale='auto'"):
        tanh_engine(mlo.Neumann(terms=50, scale=20.0)).run(1, progress=False)


def test_a_loss_without_curvature_is_named():
    lower, upper = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    graph = mlo.Graph(
        [
            mlo.Problem("lower", lower, lambda levels, _: levels.lower.weight.sum() * levels.upper.weight.sum(),
                        torch.optim.SGD(lower.parameters(), lr=0.1), None, hypergradient=mlo.Neumann()),
            mlo.Problem("upper", upper, lambda levels, _: levels.lower.weight.sum(),
                        torch.optim.SGD(upper.parameters(), lr=0.1), None),
        ],
        [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
    )  # fmt: skip
    with pytest.raises(mlo.DivergenceError, match="level 'lower', Neumann: expected a loss with curvature"):
        mlo.Engine(graph, device="cpu").run(1, progress=False)


def test_weight_decay_of_an_unknown_kind_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "weight_decay": 0.1})

    data = oracle("bilevel_implicit")
    with pytest.raises(
        mlo.GraphError, match=r"level 'l0', ConjugateGradient.*Own: expected an optimizer of torch\.optim"
    ):
        quadratic_engine(data, mlo.ConjugateGradient(), lambda _, m: Own(m.parameters()), 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: mlo.ConjugateGradient(iterations=0),
            "ConjugateGradient: iterations must be a whole number of at least 1",
        ),
        (lambda: mlo.ConjugateGradient(damping=-1), "damping must be a number of at least 0; found -1"),
        (lambda: mlo.ConjugateGradient(tolerance=float("nan")), "tolerance must be a number of at least 0; found nan"),
        (lambda: mlo.Neumann(terms=True), "Neumann: terms must be a whole number of at least 1; found True"),
        (lambda: mlo.Neumann(scale="big"), "scale must be a positive number or 'auto'; found 'big'"),
        (lambda: mlo.Neumann(scale=0), "scale must be a positive number or 'auto'; found 0"),
        (lambda: mlo.Nystrom(rank=2.0), "Nystrom: rank must be a whole number of at least 1; found 2.0"),
        (lambda: mlo.Nystrom(damping=-1), "Nystrom: damping must be a number of at least 0; found -1"),
    ],
)
def test_arguments_out_of_range(build, message):
    with pytest.raises(mlo.MloError, match=message):
        build()


@pytest.mark.parametrize("rollback", [False, True])
def test_a_converged_level_in_a_nest_may_be_unrolled_or_differentiated_implicitly(rollback):
    """With rollback a level that was put back took its records along."""

    class Pair(torch.nn.Module):
        def __init__(self, *values):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def low_loss(levels, batch):
        return ((levels.low.w - levels.mid.w.sin()) ** 2).sum() + 0.1 * (levels.low.w**4).sum()

    def mid_loss(levels, batch):
        return ((levels.mid.w - levels.top.w) ** 2).sum() + (levels.low.w**2 * levels.mid.w).sum()

    def top_loss(levels, batch):
        return ((levels.mid.w - 1) ** 2).sum() + (levels.low.w**3).sum()

    def engine(estimator):
        modules = {"low": Pair(0.3, 0.1), "mid": Pair(-0.2, 0.6), "top": Pair(0.5, -0.4)}
        losses = {"low": low_loss, "mid": mid_loss, "top": top_loss}
        steps = {"low": 60, "mid": 2, "top": 1}
        estimators = {"low": estimator, "mid": mlo.Unroll(), "top": mlo.Unroll()}
        problems = [
            mlo.Problem(name, m, losses[name], sgd(name, m), None, steps=steps[name], hypergradient=estimators[name])
            for name, m in modules.items()
        ]
        edges = [("mid", "low"), ("low", "mid"), ("top", "mid"), ("mid", "top"), ("low", "top")]
        return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*e) for e in edges]), device="cpu", rollback=rollback)

    exact = engine(mlo.Unroll()).hypergradient("top")["w"]
    found = engine(mlo.ConjugateGradient(tolerance=1e-12)).hypergradient("top")["w"]
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize(
    "estimator", [mlo.Neumann(), mlo.Neumann(terms=3, scale=0.1), mlo.Neumann(warm_start=True)], ids=repr
)
def test_neumann_leaves_an_overflow_to_the_loss_scale(estimator):
    """In fp16 the cotangent is that of the scaled loss, which may overflow: the scale is lowered, the run goes on."""
    torch.manual_seed(0)
    low, up = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    batches = torch.randn(2, 8, 3).unbind()

    def fit(levels, batch):
        return (levels.low(batch).float() - levels.up(batch).float()).square().mean()

    def judge(levels, batch):
        return (levels.low(batch) * 200).float().square().mean()

    problems = [
        mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.1), batches, hypergradient=estimator),
        mlo.Problem("up", up, judge, torch.optim.SGD(up.parameters(), lr=1e-6), batches),
    ]
    graph = mlo.Graph(problems, [mlo.Edge("up", "low"), mlo.Edge("low", "up")])
    engine = mlo.Engine(graph, device="cpu", precision="fp16")
    before = up.weight.detach().clone()
    engine.run(1, progress=False)
    assert torch.equal(up.weight, before)
    engine.run(20, progress=False)
    assert not torch.equal(up.weight, before)


@pytest.mark.parametrize("length", [1e-20, 1e-30])
def test_conjugate_gradients_of_a_short_cotangent(length):
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    b = torch.tensor([1.0, -1.0])
    found = conjugate_gradient(lambda v: matrix @ v, b * length, iterations=5).x
    torch.testing.assert_close(found / length, torch.linalg.solve(matrix, b))


def test_conjugate_gradients_that_have_gone_far_off_are_zero():
    h, b = torch.tensor([1.0, -0.999], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    found = conjugate_gradient(lambda v: h * v, b, iterations=20)
    assert found.figures == {"residual": 1.0, "iterations": 1, "negative_curvature": 1}
    assert not found.x.any()


def test_conjugate_gradients_stop_at_negative_curvature_where_the_residual_was_least():
    """Before that, a direction of hardly any curvature takes a step of any length."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
        values = torch.linspace(0.1, 1.5, 12, dtype=torch.float64)
        values[0] = -0.005
        matrix, b = basis * values @ basis.T, torch.randn(12, generator=generator, dtype=torch.float64)
        found = conjugate_gradient(lambda v, matrix=matrix: matrix @ v, b, iterations=20)
        assert found.figures["negative_curvature"] == 1
        residual = float((b - matrix @ found.x).norm() / b.norm())
        assert residual == pytest.approx(found.figures["residual"])
        assert residual <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neumann_says_what_is_not_finite_where_no_loss_is_scaled(precision):
    lower, upper = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    sgd = torch.optim.SGD
    levels = [
        mlo.Problem("lower", lower, lambda levels, x: (levels.lower(x) - levels.upper(x)).square().mean(),
                    sgd(lower.parameters(), 0.1), [torch.ones(2, 1)], hypergradient=mlo.Neumann()),
        mlo.Problem("upper", upper, lambda levels, x: (levels.lower(x) * 1e30).float().square().mean(),
                    sgd(upper.parameters(), 0.1), [torch.ones(2, 1)]),
    ]  # fmt: skip
    graph = mlo.Graph(levels, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
    with pytest.raises(mlo.DivergenceError, match="the terms of the series grow, to nan"):
        mlo.Engine(graph, device="cpu", precision=precision).run(1, progress=False)
    assert torch.isfinite(upper.weight).all()


def test_nystrom_leaves_a_divergence_to_the_loss():
    lower, upper = Vector([0.3, -0.2]), Vector([0.5, 1.5])

    def problem(name, module, loss, rate, **options):
        return mlo.Problem(name, module, loss, torch.optim.SGD(module.parameters(), lr=rate), None, **options)

    levels = [
        problem("lower", lower, lambda levels, batch: (levels.lower.w - levels.upper.w).pow(4).sum(), 1e200,
                hypergradient=mlo.Nystrom(rank=1), steps=2),
        problem("upper", upper, lambda levels, batch: levels.lower.w.square().sum(), 0.1),
    ]  # fmt: skip
    graph = mlo.Graph(levels, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
    with pytest.raises(mlo.DivergenceError):
        mlo.Engine(graph, device="cpu").run(3, progress=False)
