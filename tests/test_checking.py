"""`Engine.check`: right where an estimator is exact, alarmed where one lies, silent where nothing can be said, pure."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mlo
from mlo.checking import Differences, compare
from mlo.randomness import generator_states

from .conformance.random_graphs import draw_graph
from .toys import assert_same_state, state_of, three_levels


class Vector(nn.Module):
    def __init__(self, *values, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=dtype))


def engine_of(losses, edges, modules, *, estimators, steps, lr=0.1, **options):
    levels = [
        mlo.Problem(name, modules[name], loss, torch.optim.SGD(modules[name].parameters(), lr=lr, momentum=0.5), None,
                    hypergradient=estimators.get(name, mlo.Unroll()), steps=steps.get(name, 1))
        for name, loss in losses.items()
    ]  # fmt: skip
    return mlo.Engine(mlo.Graph(levels, edges), device="cpu", **options)


def bilevel(estimator, *, steps=3, lower=None, upper=None, u=(0.4, -0.3, 1.2), **options):
    losses = {
        "low": lower or (lambda levels, batch: ((levels.low.w - levels.up.w.tanh()) ** 2).sum()),
        "up": upper or (lambda levels, batch: (levels.low.w**3).sum() + (levels.up.w**2).sum()),
    }
    modules = {"low": Vector(0.3, 0.7, -0.2), "up": Vector(*u)}
    edges = [mlo.Edge("up", "low"), mlo.Edge("low", "up")]
    return engine_of(losses, edges, modules, estimators={"low": estimator}, steps={"low": steps}, **options)


def only(check):
    (level,) = check.levels
    return level


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize(
    ("num_levels", "nested", "seed"), [(2, False, 0), (2, False, 3), (3, False, 1), (3, True, 0), (4, True, 1)]
)
def test_unroll_is_exact_on_random_graphs(num_levels, nested, seed, rollback):
    """Momentum, Nesterov, Adam, AdamW, weight decay, clipping, warm starts, nests."""
    engine = draw_graph(seed, num_levels, nested=nested).engine(mlo.Unroll(), rollback=rollback)
    engine.run(2, progress=False)
    found = engine.check(directions=2, progress=False)
    structure = engine.graph.structure
    assert [level.level for level in found.levels] == [n for n in structure.names if structure.inside[n]]
    for level in found.levels:
        assert level.verdict == "exact"
        assert level.error < 1e-8
        assert level.cosine == pytest.approx(1, abs=1e-8)
        assert level.num_smooth == level.num_directions == 2


def test_a_diamond():
    losses = {
        "base": lambda levels, batch: ((levels.base.w - levels.top.w) ** 2).sum() + (levels.base.w**4).sum(),
        "left": lambda levels, batch: ((levels.left.w - levels.base.w.sin()) ** 2).sum(),
        "right": lambda levels, batch: ((levels.right.w + levels.base.w**2) ** 2).sum(),
        "top": lambda levels, batch: (levels.left.w * levels.right.w).sum(),
    }
    edges = [mlo.Edge(s, t) for s, t in
             (("top", "base"), ("base", "left"), ("base", "right"), ("left", "top"), ("right", "top"))]  # fmt: skip
    modules = {name: Vector(0.2 + i, 0.5 - i) for i, name in enumerate(losses)}
    found = only(engine_of(losses, edges, modules, estimators={}, steps={"left": 2}, lr=0.05).check(progress=False))
    assert found.verdict == "exact"
    assert found.num_directions == found.num_variables == 2  # the whole gradient


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rollback", [False, True])
def test_batch_norm_dropout_schedulers_and_float32(precision, rollback):
    engine = three_levels(estimator=mlo.Unroll(), precision=precision, rollback=rollback)
    engine.run(1, progress=False)
    found = only(engine.check(progress=False))
    assert found.verdict == "exact"
    assert found.num_directions == found.num_variables == 6


@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.Neumann(terms=2, warm_start=True)], ids=repr)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_check_changes_nothing(estimator, precision):
    torch.manual_seed(0)
    checked, plain = (three_levels(estimator=estimator, precision=precision) for _ in range(2))
    for engine in (checked, plain):
        engine.run(1, progress=False)
    before, generators = state_of(checked), generator_states(torch.device("cpu"))
    pointers = [p.data_ptr() for level in checked.graph.levels for p in level.module.parameters()]
    checked.check(directions=1, progress=False)
    assert_same_state(before, state_of(checked))
    assert generator_states(torch.device("cpu")) == generators
    assert pointers == [p.data_ptr() for level in checked.graph.levels for p in level.module.parameters()]
    metrics = [{k: v for k, v in e.run(2, progress=False).items() if k != "round_seconds"} for e in (checked, plain)]
    assert metrics[0] == metrics[1]
    assert_same_state(state_of(checked), state_of(plain))


def test_a_check_that_fails_on_the_way_changes_nothing():
    @dataclass(frozen=True)
    class Failing(mlo.Hypergradient):
        def pullback(self, cotangent, response):
            raise RuntimeError("no")

    engine = three_levels(estimator=Failing())
    before = state_of(engine)
    with pytest.raises(RuntimeError, match="no"):
        engine.check(progress=False)
    assert_same_state(before, state_of(engine))
    assert engine.graph["teacher"].module[0].weight.dtype == torch.float32


def lbt_shaped(*, detached):
    """Teacher, student, architecture; the student reads the architecture too."""
    losses = {
        "teacher": lambda levels, batch: ((levels.teacher.w - levels.architecture.w.tanh()) ** 2).sum(),
        "student": lambda levels, batch: (
            (levels.student.w - levels.teacher.w * levels.architecture.w.exp()) ** 2
        ).sum(),
        "architecture": lambda levels, batch: (levels.teacher.w**2).sum() + (levels.student.w - 1).pow(4).sum(),
    }
    edges = [
        mlo.Edge("architecture", "teacher"), mlo.Edge("teacher", "student"), mlo.Edge("teacher", "architecture"),
        mlo.Edge("student", "architecture"), mlo.Edge("architecture", "student", detached=detached),
    ]  # fmt: skip
    modules = {"teacher": Vector(0.3, 0.1), "student": Vector(-0.2, 0.6), "architecture": Vector(0.5, -0.4)}
    return engine_of(losses, edges, modules, estimators={}, steps={"teacher": 2, "student": 2})


def test_a_detached_edge_is_held_still():
    paper, complete = lbt_shaped(detached=True), lbt_shaped(detached=False)
    assert only(paper.check(progress=False)).verdict == "exact"
    assert only(complete.check(progress=False)).verdict == "exact"
    ratio = paper.hypergradient("architecture")["w"] / complete.hypergradient("architecture")["w"]
    assert (ratio - 1).abs().max() > 0.1


@pytest.mark.parametrize("rollback", [False, True])
def test_a_detached_edge_from_a_level_that_moves_in_a_nest(rollback):
    """`low` reads the outermost level by value, `up` reads `side` by value while `side` moves."""
    losses = {
        "low": lambda levels, batch: ((levels.low.w - levels.mid.w * levels.top.w) ** 2).sum(),
        "side": lambda levels, batch: ((levels.side.w - levels.top.w) ** 2).sum(),
        "mid": lambda levels, batch: ((levels.mid.w - levels.low.w - levels.top.w) ** 2 * levels.side.w.exp()).sum(),
        "top": lambda levels, batch: (levels.mid.w**2).sum() + (levels.low.w**3 + levels.side.w).sum(),
    }
    edges = [
        mlo.Edge("mid", "low"), mlo.Edge("low", "mid"), mlo.Edge("top", "mid"), mlo.Edge("mid", "top"),
        mlo.Edge("low", "top"), mlo.Edge("top", "side"), mlo.Edge("side", "top"),
        mlo.Edge("top", "low", detached=True), mlo.Edge("side", "mid", detached=True),
    ]  # fmt: skip
    modules = {name: Vector(0.2 * i + 0.1, 0.7 - 0.3 * i) for i, name in enumerate(losses)}
    steps = {"low": 2, "side": 2, "mid": 3}
    engine = engine_of(losses, edges, modules, estimators={}, steps=steps, lr=0.05, rollback=rollback)
    for level in engine.check(progress=False).levels:
        assert level.verdict == "exact", level


@dataclass(frozen=True)
class OnePercentOff(mlo.Hypergradient):
    claims: bool

    def claim(self, steps, num_variables):
        return mlo.Claim("exact, it says", exact=True) if self.claims else super().claim(steps, num_variables)

    def pullback(self, cotangent, response):
        found = mlo.Unroll().pullback(cotangent, response)
        return {q: tuple(1.01 * c for c in cs) for q, cs in found.items()}


def test_a_wrong_estimator_that_claims_exactness_is_caught():
    found = bilevel(OnePercentOff(claims=True), upper=lambda levels, batch: levels.low.w.sum()).check(progress=False)
    assert not found.passed
    assert only(found).verdict == "WRONG"
    assert only(found).error == pytest.approx(0.01, rel=1e-5)
    assert "WRONG" in str(found)


def test_an_estimator_without_a_claim_is_reported_and_not_judged():
    found = bilevel(OnePercentOff(claims=False)).check(progress=False)
    assert found.passed
    assert only(found).verdict == "approximate"
    assert "OnePercentOff makes no claim" in str(found)


@pytest.mark.parametrize(
    ("estimator", "text"),
    [
        (mlo.FiniteDifference(last=1), "leaves out the first 2 of 3 steps"),
        (mlo.FiniteDifference(last=None), "error of order radius^2"),
        (mlo.Unroll(last=2), "leaves out the first 1 of 3 steps"),
        (mlo.FirstOrder(), "ignores the level's response"),
        (mlo.Neumann(), "truncated series"),
        (mlo.Nystrom(rank=2), "of rank 2 of 3"),
        (mlo.ConjugateGradient(damping=0.1), "damped"),
        (mlo.ConjugateGradient(iterations=2), "2 iterations for 3 variables"),
    ],
    ids=repr,
)
def test_what_is_approximate_by_design_says_so(estimator, text):
    found = bilevel(estimator).check(progress=False)
    assert only(found).verdict == "approximate"
    assert found.passed
    assert text in str(found)


def test_enough_last_steps_are_all_steps():
    assert only(bilevel(mlo.Unroll(last=3)).check(progress=False)).verdict == "exact"


def test_an_implicit_estimator_is_judged_only_where_the_level_converges():
    short, long = (only(bilevel(mlo.ConjugateGradient(), steps=n).check(progress=False)) for n in (3, 100))
    assert short.verdict == "approximate"
    assert short.remaining["low"] > 0.1
    assert short.error > 0.01
    assert long.verdict == "exact"
    assert long.remaining["low"] < 1e-8


def test_a_level_at_rest_has_not_converged_if_it_cannot_follow():
    """Its gradient is zero, and one step of learning rate 0.1 does not bring it to the next minimum."""
    engine = bilevel(mlo.ConjugateGradient(), steps=1)
    with torch.no_grad():
        engine.graph["low"].module.w.copy_(engine.graph["up"].module.w.tanh())
    found = only(engine.check(progress=False))
    assert found.verdict == "approximate"
    assert found.remaining["low"] == 1


def test_an_estimator_inside_a_nest_that_the_sweep_does_not_use_counts_as_exact():
    """The middle level's steps use it, and those steps are what is differentiated."""

    def losses(reads_low):
        return {
            "low": lambda levels, batch: ((levels.low.w - levels.mid.w.sin()) ** 2).sum(),
            "mid": lambda levels, batch: ((levels.mid.w - levels.top.w) ** 2).sum() + (levels.low.w**2).sum(),
            "top": lambda levels, batch: (levels.mid.w**3).sum() + (levels.low.w.sum() if reads_low else 0),
        }

    edges = [mlo.Edge("mid", "low"), mlo.Edge("low", "mid"), mlo.Edge("top", "mid"), mlo.Edge("mid", "top")]
    for reads_low, verdict in ((False, "exact"), (True, "approximate")):
        engine = engine_of(
            losses(reads_low),
            [*edges, *([mlo.Edge("low", "top")] if reads_low else [])],
            {"low": Vector(0.3, 0.1), "mid": Vector(-0.2, 0.6), "top": Vector(0.5, -0.4)},
            estimators={"low": mlo.FirstOrder()},
            steps={"low": 2, "mid": 2},
        )
        assert only(engine.check("top", progress=False)).verdict == verdict


@pytest.mark.parametrize("rollback", [False, True])
def test_an_implicit_estimator_in_a_nest(rollback):
    """With rollback a restored level once took its records along."""
    losses = {
        "low": lambda levels, batch: ((levels.low.w - levels.mid.w.sin()) ** 2).sum() + 0.1 * (levels.low.w**4).sum(),
        "mid": lambda levels, batch: (
            ((levels.mid.w - levels.top.w) ** 2).sum() + (levels.low.w**2 * levels.mid.w).sum()
        ),
        "top": lambda levels, batch: ((levels.mid.w - 1) ** 2).sum() + (levels.low.w**3).sum(),
    }
    edges = [mlo.Edge("mid", "low"), mlo.Edge("low", "mid"), mlo.Edge("top", "mid"), mlo.Edge("mid", "top"),
             mlo.Edge("low", "top")]  # fmt: skip
    modules = {"low": Vector(0.3, 0.1), "mid": Vector(-0.2, 0.6), "top": Vector(0.5, -0.4)}
    engine = engine_of(losses, edges, modules, estimators={"low": mlo.ConjugateGradient()},
                       steps={"low": 60, "mid": 2}, rollback=rollback)  # fmt: skip
    assert [level.verdict for level in engine.check(progress=False).levels] == ["exact", "exact"]


def test_what_an_estimator_remembers_is_the_same_in_every_repetition():
    losses = {
        "low": lambda levels, batch: ((levels.low.w - levels.mid.w.sin()) ** 2).sum() + (levels.low.w**4).sum(),
        "mid": lambda levels, batch: ((levels.mid.w - levels.top.w) ** 2).sum() + (levels.low.w**2).sum(),
        "top": lambda levels, batch: (levels.mid.w**3).sum(),
    }
    edges = [mlo.Edge("mid", "low"), mlo.Edge("low", "mid"), mlo.Edge("top", "mid"), mlo.Edge("mid", "top")]
    modules = {"low": Vector(0.3, 0.1), "mid": Vector(-0.2, 0.6), "top": Vector(0.5, -0.4)}
    engine = engine_of(losses, edges, modules, estimators={"low": mlo.Neumann(terms=1, warm_start=True)},
                       steps={"mid": 2})  # fmt: skip
    engine.run(1, progress=False)
    assert [level.verdict for level in engine.check(progress=False).levels] == ["approximate", "approximate"]


class Centred(Vector):
    """Reads a running mean of its weights, which its own steps move."""

    def __init__(self, *values):
        super().__init__(*values)
        self.register_buffer("mean", torch.zeros(len(values)).double())

    def forward(self):
        centred = self.w - self.mean
        self.mean.lerp_(self.w.detach(), 0.5)
        return centred


@pytest.mark.parametrize("since", [0.0, 0.5])
def test_statistics_that_a_loss_reads_are_those_of_the_step(since):
    """A level in a nest is read in evaluation mode, and its statistics move between the steps that read it."""
    torch.manual_seed(0)
    modules = {
        "u": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 1)),
        "q": nn.Linear(3, 1),
        "t": nn.Linear(3, 1),
    }
    data = {name: [(torch.randn(8, 3) * (i + 1), torch.randn(8, 1)) for i in range(4)] for name in modules}

    def u_loss(levels, batch):
        return (levels.u(batch[0]) - batch[1] - levels.q(batch[0])).square().mean()

    def q_loss(levels, batch):
        if levels.progress >= since:
            levels.u.eval()
        output = levels.u(batch[0])
        levels.u.train()
        return (output * levels.q(batch[0]) - batch[1] - levels.t(batch[0])).square().mean()

    def t_loss(levels, batch):
        return (levels.q(batch[0]) - batch[1]).square().mean()

    losses, steps = {"u": u_loss, "q": q_loss, "t": t_loss}, {"q": 3}
    levels = [
        mlo.Problem(name, module.double(), losses[name], torch.optim.SGD(module.parameters(), lr=0.02),
                    [(x.double(), y.double()) for x, y in data[name]], steps=steps.get(name, 1),
                    hypergradient=mlo.FirstOrder() if name == "u" else mlo.Unroll())
        for name, module in modules.items()
    ]  # fmt: skip
    edges = [mlo.Edge("q", "u"), mlo.Edge("u", "q"), mlo.Edge("t", "q"), mlo.Edge("q", "t")]
    engine = mlo.Engine(mlo.Graph(levels, edges), device="cpu")
    engine.run(2, progress=False)
    check = only(engine.check("t", progress=False))
    assert check.verdict == "exact", check


@pytest.mark.parametrize("compiled", [[], ["q"]])
def test_a_level_that_begins_to_read_its_own_statistics(compiled):
    """The first batch is read in training mode, most later ones in evaluation mode."""
    torch.manual_seed(0)
    modules = {
        "q": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 1)).double(),
        "t": nn.Linear(3, 1).double(),
    }

    def fit(levels, batch):
        x, y, training = batch
        levels.q.train(training)
        loss = (levels.q(x) - y - levels.t(x)).square().mean()
        levels.q.train()
        return loss

    def top(levels, batch):
        return (levels.q(batch[0]) - batch[1]).square().mean()

    batches = [(torch.randn(8, 3).double() * (i + 1), torch.randn(8, 1).double(), i % 4 == 0) for i in range(6)]
    optimizers = {name: torch.optim.SGD(module.parameters(), lr=0.02) for name, module in modules.items()}
    levels = [
        mlo.Problem("q", modules["q"], fit, optimizers["q"], batches, steps=3, hypergradient=mlo.Unroll()),
        mlo.Problem("t", modules["t"], top, optimizers["t"], batches),
    ]  # fmt: skip
    graph = mlo.Graph(levels, [mlo.Edge("t", "q"), mlo.Edge("q", "t")])
    engine = mlo.Engine(graph, device="cpu", compile=compiled)
    engine.run(1, progress=False)
    assert engine._levels["q"].buffers.versions()  # found out when the steps were taken
    check = only(engine.check("t", progress=False))
    assert check.verdict == "exact", check


def test_buffers_count_as_constant():
    losses = {
        "low": lambda levels, batch: ((levels.low() - levels.up.w.tanh()) ** 2).sum(),
        "up": lambda levels, batch: (levels.low() ** 3).sum(),
    }
    modules = {"low": Centred(0.3, 0.7), "up": Vector(0.4, -0.3)}
    edges = [mlo.Edge("up", "low"), mlo.Edge("low", "up")]
    engine = engine_of(losses, edges, modules, estimators={}, steps={"low": 3})
    assert only(engine.check(progress=False)).verdict == "exact"
    assert modules["low"].mean.abs().max() == 0


@pytest.mark.parametrize("at", [0.0, 5e-7])
def test_a_kink_is_not_judged(at):
    """At the point itself, where both central differences agree, and between the radii."""
    engine = bilevel(
        OnePercentOff(claims=True),
        lower=lambda levels, batch: ((levels.low.w - levels.up.w.relu()) ** 2).sum(),
        u=(at, at, at),
    )
    found = engine.check(progress=False)
    assert only(found).verdict == "not smooth"
    assert found.passed
    assert "not judged: not smooth here" in str(found)
    assert "3 of 3 directions are not smooth here" in str(found)


def test_away_from_the_kink_relu_is_smooth():
    engine = bilevel(mlo.Unroll(), lower=lambda levels, batch: ((levels.low.w - levels.up.w.relu()) ** 2).sum())
    assert only(engine.check(progress=False)).verdict == "exact"


def measured(large, small, jumps=None, value=1.0):
    central = torch.tensor([large, small], dtype=torch.float64)
    return Differences(central, torch.zeros_like(central) if jumps is None else torch.tensor(jumps).double(), value)


@pytest.mark.parametrize(
    ("found", "slopes", "expected"),
    [
        ([1.0, 2.0, 9.0], measured([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), (2, 0.0, 1.0, "exact")),
        ([1.0, 9.0, 9.0], measured([1.0, 2.0, 3.0], [1.0, 3.0, 4.0]), (1, 0.0, 1.0, "not smooth")),
        ([1.0, 2.0], measured([1.0, 3.0], [1.0, 3.0], [[1e-3, 0.5], [1e-4, 0.5]]), (1, 0.0, 1.0, "exact")),
        ([-1.0, 0.0], measured([1.0, 0.0], [1.0, 0.0]), (2, 2.0, -1.0, "WRONG")),
        ([0.0, 0.0], measured([0.0, 0.0], [0.0, 0.0]), (2, 0.0, math.nan, "exact")),
        ([0.0, 0.0], measured([1e-10, 0.0], [-1e-9, 0.0]), (2, 1.0, math.nan, "flat")),
        ([0.0, 1e-4], measured([0.0, 0.0], [0.0, 0.0]), (2, math.inf, math.nan, "WRONG")),
        ([0.0, math.nan], measured([0.0, 1.0], [0.0, 1.0]), (2, math.nan, math.nan, "WRONG")),
        ([1.0], measured([math.nan], [math.nan]), (0, math.nan, math.nan, "not smooth")),
    ],
)
def test_verdicts(found, slopes, expected):
    found = compare(torch.tensor(found, dtype=torch.float64), slopes, (1e-6, 1e-7), 1e-4, judged=True)
    assert _same(found, expected)


def _same(a, b):
    return all(
        x == pytest.approx(y, nan_ok=True) if isinstance(y, float) else x == y for x, y in zip(a, b, strict=True)
    )


def test_losses_may_hold_float32_constants():
    target = torch.ones(3)
    net, scale = nn.Linear(3, 3), Vector(0.5, dtype=torch.float32)
    levels = [
        mlo.Problem("net", net, lambda levels, batch: (levels.net(target).float() * levels.scale.w - 1).square().mean(),
                    torch.optim.Adam(net.parameters(), eps=1e-3), None, steps=2, hypergradient=mlo.Unroll()),
        mlo.Problem("scale", scale, lambda levels, batch: levels.net(torch.ones(1, 3)).square().mean(),
                    torch.optim.SGD(scale.parameters(), lr=0.1), None),
    ]  # fmt: skip
    engine = mlo.Engine(mlo.Graph(levels, [mlo.Edge("scale", "net"), mlo.Edge("net", "scale")]), device="cpu")
    assert only(engine.check(progress=False)).verdict == "exact"


def test_mistakes_are_named():
    engine = bilevel(mlo.Unroll())
    with pytest.raises(mlo.GraphError, match="Did you mean 'low'"):
        engine.check("lov")
    with pytest.raises(mlo.GraphError, match=r"levels solved inside level 'low'; found none.*nothing to check"):
        engine.check("low")
    with pytest.raises(mlo.MloError, match="directions must be a whole number of at least 1; found 0"):
        engine.check(directions=0)
    with pytest.raises(
        mlo.MloError, match=r"radii must be two positive numbers of at most 1e-6.*found \(0.0001, 1e-05\)"
    ):
        engine.check(radii=(1e-4, 1e-5))
    with pytest.raises(mlo.MloError, match=r"radii must be two positive numbers .*found 1e-06"):
        engine.check(radii=1e-6)
    with pytest.raises(mlo.MloError, match="tolerance must be a number between 0 and 1; found 2"):
        engine.check(tolerance=2)
    alone = Vector(1.0)
    level = mlo.Problem("w", alone, lambda levels, batch: levels.w.w.sum(),
                        torch.optim.SGD(alone.parameters(), lr=0.1), None)  # fmt: skip
    with pytest.raises(mlo.GraphError, match="inside any level; found none"):
        mlo.Engine(mlo.Graph([level]), device="cpu").check()


def test_a_loss_that_does_not_repeat_is_refused():
    calls = []

    def impure(levels, batch):
        calls.append(1)
        return (levels.low.w * len(calls)).sum() + levels.up.w.sum()

    with pytest.raises(mlo.MloError, match="expected the same loss when the same steps are taken again"):
        bilevel(mlo.Unroll(), upper=impure).check(progress=False)


def test_directions_are_drawn_from_the_seed():
    engine = draw_graph(0, 2).engine(mlo.FiniteDifference(radius=0.1, last=1))
    first, again, other = (only(engine.check(directions=2, seed=s, progress=False)).error for s in (0, 0, 1))
    assert first == again != other


def test_the_progress_bar_counts_the_solves(capsys):
    bilevel(mlo.Unroll()).check()
    assert "check up" in capsys.readouterr().err


@pytest.mark.parametrize(("estimator", "symmetric"), [(mlo.Unroll(), True), (mlo.Unroll(last=1), False)])
def test_the_symmetry_of_a_nest_is_reported(estimator, symmetric):
    graph = draw_graph(0, 3, nested=True)
    graph.steps = dict.fromkeys(graph.names, 3)
    found = graph.engine(estimator).check("level2", progress=False)
    (asymmetry,) = found.levels[0].asymmetries.values()
    assert asymmetry < 1e-9 if symmetric else asymmetry > 1e-4
    assert f"its total curvature is asymmetric by {asymmetry:.1e}" in str(found)


@pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far")
def test_a_nest_without_second_derivatives_is_checked_without_them():
    found = draw_graph(0, 3, nested=True).engine(mlo.Penalty(steps=20)).check("level2", progress=False)
    assert not found.levels[0].asymmetries
    assert found.levels[0].verdict == "approximate"


def filtered(levels, batch):
    return (levels.low.w**2).sum() + sum((p**2).sum() for p in levels.up.parameters() if p.requires_grad)


def penalized(levels, batch):
    own = levels.up.w
    (gradient,) = torch.autograd.grad((own**3).sum() + (levels.low.w * own).sum(), [own], create_graph=True)
    return (levels.low.w**2).sum() + gradient.square().sum()


def hooked(levels, batch):
    twice = levels.up.w * 2
    twice.register_hook(lambda g: g)
    return (levels.low.w**2).sum() + twice.square().sum()


@pytest.mark.parametrize("upper", [filtered, penalized, hooked])
def test_a_loss_may_go_by_its_own_variables_requiring_a_gradient(upper):
    assert only(bilevel(mlo.Unroll(), upper=upper).check(directions=3, progress=False)).error < 1e-6
