"""The graph of a level's last step, which `Unroll` goes back through: never a pass twice, never a graph out of date."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import mlo
from tests.toys import assert_resumes

from .quadratics import relative_error
from .random_graphs import flat

KEPT, ALL_KEPT, NOT_KEPT = mlo.Unroll(), mlo.Unroll(graphs=None), mlo.Unroll(graphs=0)


class Drifting(nn.Linear):
    """Goes by a buffer that it writes into in every pass, and by another one that anyone may write into."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("gain", torch.ones(3))

    def forward(self, x):
        self.passes += 1
        return super().forward(x) * self.gain * (1 + 0.1 * self.passes)


def bilevel(estimator, *, steps=1, low=None, up=None, fit=None, judge=None, **options):
    torch.manual_seed(0)
    low = nn.Sequential(low() if low else nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    up = (up() if up else nn.Sequential(nn.Linear(3, 3), nn.Tanh())).double()
    batches = torch.randn(4, 8, 3, dtype=torch.float64).unbind()

    def imitate(levels, batch):
        return (levels.low(batch) - levels.up(batch)).pow(4).mean()

    def score(levels, batch):
        return (levels.low(batch) - 1).square().mean()

    sgd = torch.optim.SGD(low.parameters(), lr=0.2, momentum=0.9)
    graph = mlo.Graph(
        [
            mlo.Problem("low", low, fit or imitate, sgd, batches, hypergradient=estimator, steps=steps),
            mlo.Problem("up", up, judge or score, torch.optim.Adam(up.parameters(), lr=0.01), batches),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )
    return mlo.Engine(graph, seed=1, device="cpu", **options)


def assert_same_rounds(make, rounds=3):
    """With the last graph kept, with all of them and with none, every round's hypergradient is the same."""
    engines = [make(estimator) for estimator in (NOT_KEPT, KEPT, ALL_KEPT)]
    for _ in range(rounds):
        expected, *found = (flat(engine.hypergradient("up").values()) for engine in engines)
        assert expected.norm() > 1e-4
        for own in found:
            assert relative_error(own, expected) < 1e-12
        for engine in engines:
            engine.run(1, progress=False)
    return engines[-1]


@pytest.mark.parametrize(
    ("estimator", "again"),
    [(ALL_KEPT, 0), (mlo.Unroll(graphs=2), 1), (KEPT, 2), (NOT_KEPT, 3), (mlo.Unroll(checkpoint=True), 4),
     (mlo.Unroll(last=2, graphs=None), 0), (mlo.Unroll(last=2), 1), (mlo.FiniteDifference(), 2)],
    ids=str,
)  # fmt: skip
def test_a_step_whose_graph_was_kept_is_not_computed_again(estimator, again):
    """Of three; with `checkpoint` one in between is recomputed from the first, too."""
    engine = bilevel(estimator, steps=3)
    passed = []
    engine.run(1, progress=False)
    engine.graph["low"].module.register_forward_hook(lambda *_: passed.append(1))
    engine.run(1, progress=False)
    assert len(passed) == 3 + 1 + again  # three steps, one evaluation


@pytest.mark.parametrize("steps", [1, 3])
def test_the_numbers_are_those_of_the_graph_made_again(steps):
    assert_same_rounds(lambda estimator: bilevel(estimator, steps=steps))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("low", [Drifting, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))])
def test_modules_with_buffers_and_random_draws(low, train):
    def make(estimator):
        engine = bilevel(estimator, steps=2, low=low)
        for name in ("low", "up"):
            engine.graph[name].module.train(train)
        return engine

    assert_same_rounds(make)


def test_a_buffer_written_into_after_the_step():
    """By the loss of the upper level, past the views: autograd would refuse to go through the graph."""

    def make(estimator):
        gains = []

        def judge(levels, batch):
            for gain in gains:
                gain.mul_(1.5)
            return (levels.low(batch) - 1).square().mean()

        engine = bilevel(estimator, low=Drifting, judge=judge)
        gains.append(engine.graph["low"].module[0].gain)
        return engine

    assert_same_rounds(make)


def test_a_level_that_moves_after_the_step():
    """`first` reads `second`, which steps after it and before both are differentiated."""

    def make(estimator):
        torch.manual_seed(0)
        modules = {name: nn.Linear(3, 3).double() for name in ("first", "second", "up")}
        batches = torch.randn(3, 8, 3, dtype=torch.float64).unbind()

        def fit(levels, batch):
            return (levels.first(batch) @ levels.second.weight - levels.up(batch)).square().mean()

        def follow(levels, batch):
            return (levels.second(batch) - levels.first(batch).sin()).square().mean()

        def judge(levels, batch):
            return (levels.first(batch) + levels.second(batch) - 1).square().mean()

        losses = {"first": fit, "second": follow, "up": judge}
        graph = mlo.Graph(
            [
                mlo.Problem(name, module, losses[name], torch.optim.SGD(module.parameters(), lr=0.2), batches,
                            hypergradient=estimator, steps=1 if name == "up" else 2)
                for name, module in modules.items()
            ],
            [
                mlo.Edge("up", "first"), mlo.Edge("second", "first", detached=True), mlo.Edge("first", "second"),
                mlo.Edge("first", "up"), mlo.Edge("second", "up"),
            ],
        )  # fmt: skip
        return mlo.Engine(graph, device="cpu")

    kept = assert_same_rounds(make)
    (level,) = kept.check("up", progress=False).levels
    assert level.error < 1e-5


def hooked(estimator):
    engine = bilevel(estimator)
    weight = engine.graph["low"].module[0].weight
    weight.register_hook(torch.zeros_like)
    return engine, weight, weight.detach().clone()


def test_hooks_of_parameters_act_on_the_step():
    engine, weight, before = hooked(mlo.FirstOrder())
    engine.run(2, progress=False)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    "estimator",
    [NOT_KEPT, KEPT, ALL_KEPT, mlo.FiniteDifference(), mlo.ConjugateGradient(damping=1.0), mlo.SAMA(), mlo.Penalty()],
    ids=repr,
)
def test_hooks_of_parameters_are_refused_where_steps_are_differentiated(estimator):
    """They would act on the step and not on its derivatives, which are taken at other tensors."""
    with pytest.raises(mlo.MloError, match=r"level 'low': expected parameters without hooks.* found one on 0\.weight"):
        hooked(estimator)[0].run(1, progress=False)


class Recomputed(nn.Module):
    """Batch normalization moves its statistics in the forward pass, and may not when it is recomputed."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False)


class Averaging(nn.Linear):
    """Moves a buffer in a way that autograd does not see."""

    def __init__(self):
        super().__init__(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        y = super().forward(x)
        self.mean.data.lerp_(y.detach().mean(0), 0.5)
        return y * self.mean.exp()


class Listing(nn.Linear):
    """Has a list of its own of its parameters."""

    def __init__(self):
        super().__init__(3, 3)
        self.mine = [self.weight, self.bias]

    def forward(self, x):
        return super().forward(x) * (1 + sum(p.square().sum() for p in self.mine))


@pytest.mark.parametrize("low", [Recomputed, Averaging, Listing])
def test_modules_that_make_a_kept_graph_useless(low):
    engine = assert_same_rounds(lambda estimator: bilevel(estimator, steps=2, low=low))
    assert engine._levels["low"].habits.keeps_graphs == (low is Averaging)  # which keeps the last one


def test_training_is_what_it_is_without_kept_graphs():
    engines = [bilevel(estimator, steps=2, low=Listing) for estimator in (NOT_KEPT, KEPT, ALL_KEPT)]
    for engine in engines:
        engine.run(3, progress=False)
    expected, *others = (flat(p.detach() for p in engine.graph["low"].module.parameters()) for engine in engines)
    assert all(torch.equal(own, expected) for own in others)


@pytest.mark.parametrize(
    "estimator",
    [
        mlo.ConjugateGradient(iterations=4, damping=0.5),
        mlo.Neumann(terms=3, scale=0.1),
        mlo.Nystrom(rank=20, damping=0.5),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
@pytest.mark.parametrize("low", [Recomputed, None], ids=["recomputed", "batch written into"])
def test_solvers_whose_kept_graph_cannot_be_used(estimator, low):
    """They take products without grad mode; the gradient is then made again with it."""

    writing = False

    def write(levels, batch):
        return (levels.low(batch.clamp_(-1, 1) if writing else batch) - 1).square().mean()

    judge = write if low is None else None
    engine, expected = (bilevel(estimator, steps=2, low=low, judge=judge) for _ in range(2))
    for each in (engine, expected):
        each.run(0, progress=False)  # where it would be refused
    writing = True
    expected._levels["low"].habits.keeps_graphs = False
    found, truth = (flat(e.hypergradient("up").values()) for e in (engine, expected))
    assert truth.norm() > 1e-3
    assert relative_error(found, truth) < 1e-9


def test_a_batch_written_into_after_the_step():
    def make(estimator):
        def judge(levels, batch):  # in the first round it would be refused
            return (levels.low(batch.clamp_(-1, 1) if levels.progress else batch) - 1).square().mean()

        return bilevel(estimator, judge=judge)

    assert not assert_same_rounds(make)._levels["low"].habits.keeps_graphs


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_term_without_second_derivatives_that_a_product_can_leave_out():
    def fit(levels, batch):
        return (levels.low(batch) - levels.up(batch)).pow(4).mean()

    def decay(levels, batch):
        return 0.1 * Once.apply(levels.low[0].weight).sum()

    assert_same_rounds(lambda estimator: bilevel(estimator, fit=mlo.Sum(fit, decay)))
    with pytest.raises(mlo.MloError, match="level 'low': expected a loss that can be differentiated twice"):
        bilevel(KEPT, fit=mlo.Sum(fit, decay), steps=2).run(1, progress=False)


def test_a_step_that_failed_leaves_nothing_behind():
    """The next one is taken at what the variables have become."""
    ends = []
    for estimator in (NOT_KEPT, KEPT):
        failing = []

        def fit(levels, batch, failing=failing):
            loss = (levels.low(batch) - levels.up(batch)).pow(4).mean()
            if failing:
                raise MemoryError
            return loss

        engine = bilevel(estimator, fit=fit)
        engine.run(1, progress=False)
        failing.append(True)
        with pytest.raises(MemoryError):
            engine.run(1, progress=False)
        failing.clear()
        low = engine.graph["low"].module
        with torch.no_grad():
            low[0].weight.zero_()
        engine.run(1, progress=False)
        ends.append(flat(p.detach() for p in low.parameters()))
    assert torch.equal(*ends)


def test_what_was_found_out_is_saved(tmp_path):
    assert_resumes(lambda: bilevel(KEPT, steps=2, low=Recomputed), tmp_path)


@pytest.mark.parametrize("options", [{"rollback": True}, {"diagnostics_every": 1}], ids=str)
def test_with_other_uses_of_the_same_solve(options):
    assert_same_rounds(lambda estimator: bilevel(estimator, steps=2, **options))


def test_diagnostics_find_nothing():
    engine = bilevel(KEPT, steps=2, diagnostics_every=1)
    assert engine.run(2, progress=False)["up.hypergradient_error"] < 1e-12


def test_a_graph_is_free_as_soon_as_it_was_used():
    """In a sweep over many levels no graph is left that was gone through; not even until garbage is collected."""
    marks = []

    class Mark:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()
            marks.append(weakref.ref(ctx.mark))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Watched(mlo.Unroll):
        def pullback(self, cotangent, response):
            before = alive()
            found = super().pullback(cotangent, response)
            counts.append((before, alive()))
            return found

    def alive():
        return sum(mark() is not None for mark in marks)

    def fit(levels, batch):
        return (Marked.apply(levels.low(batch)) - levels.up(batch)).square().mean()

    counts = []
    engine = bilevel(Watched(graphs=2), fit=fit, steps=3)
    gc.disable()
    try:
        engine.run(2, progress=False)
    finally:
        gc.enable()
    assert counts == [(2, 0), (2, 0)]
