"""Every mistake in a declaration gives one message that a user can act on."""

import pytest
import torch
import torch.distributed.tensor
from torch import nn

import mlo


def problem(name, module=None, *, loss=None, optimizer=None, **options):
    module = module or nn.Linear(1, 1)
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.1)
    return mlo.Problem(name, module, loss or reading(name), optimizer, [torch.ones(1, 1)], **options)


def reading(*names):
    return lambda levels, batch: sum(getattr(levels, n)(batch).sum() ** 2 for n in names)


def pair(a="a", b="b", edges=None, **options):
    edges = [mlo.Edge("a", "b"), mlo.Edge("b", "a")] if edges is None else edges
    return mlo.Graph([problem(a, loss=reading("a", "b"), **options), problem(b, loss=reading("a", "b"))], edges)


SHARED = nn.Linear(1, 1)
FROZEN = nn.Linear(1, 1).requires_grad_(False)
MISTAKES = {
    "no levels": (lambda: mlo.Graph([]), "a graph needs at least one level; found none"),
    "not a problem": (lambda: mlo.Graph([nn.Linear(1, 1)]), "levels: expected mlo.Problem objects; found Linear"),
    "duplicate level": (lambda: pair(b="a"), "level 'a': expected names to differ; found it 2 times. Rename one."),
    "not an edge": (lambda: pair(edges=[("a", "b")]), r"edges: expected mlo.Edge objects; found \('a', 'b'\)"),
    "unknown name": (
        lambda: pair(edges=[mlo.Edge("aa", "b")]),
        "expected one of the levels a, b; found 'aa'. Did you mean 'a'?",
    ),
    "detached by a word": (
        lambda: pair(edges=[mlo.Edge("a", "b", detached="no")]),
        "edge 'a' -> 'b': detached must be True or False; found 'no'",
    ),
    "edge to itself": (lambda: pair(edges=[mlo.Edge("a", "a")]), "found an edge from 'a' to itself. Remove it"),
    "duplicate edge": (
        lambda: pair(edges=[mlo.Edge("a", "b"), mlo.Edge("a", "b", detached=True)]),
        "edge 'a' -> 'b': expected it once; found it twice",
    ),
    "no influence": (
        lambda: pair(edges=[mlo.Edge("b", "a")]),
        r"level 'a': expected it to influence a level above it \(b\).*found no path of edges. Add mlo.Edge\('a', ...\)",
    ),
    "shared parameters": (
        lambda: mlo.Graph([problem("a", SHARED), problem("b", SHARED)], [mlo.Edge("a", "b")]),
        "levels 'a' and 'b': expected each parameter in one level; found 'weight' of 'a' in both",
    ),
    "nothing to train": (
        lambda: mlo.Graph([problem("a", FROZEN)]),
        "level 'a': expected a module with parameters that require a gradient; found none",
    ),
    "foreign parameters": (
        lambda: mlo.Graph([problem("a", optimizer=torch.optim.Adam(nn.Linear(3, 2).parameters()))]),
        r"level 'a', optimizer Adam: expected parameters of the level's own module; found 2 foreign ones .*\(2, 3\)",
    ),
    "closure": (
        lambda: mlo.Graph([problem("a", SHARED, optimizer=torch.optim.LBFGS(SHARED.parameters()))]),
        "level 'a', optimizer LBFGS: expected an optimizer that steps without a closure",
    ),
    "differentiable": (
        lambda: mlo.Graph(
            [problem("a", SHARED, optimizer=torch.optim.SGD(SHARED.parameters(), lr=1.0, differentiable=True))]
        ),
        "level 'a', optimizer SGD: expected differentiable=False; found True",
    ),
    "optimizer without rule": (
        lambda: mlo.Graph(
            [
                problem("a", SHARED, loss=reading("a", "b"), optimizer=torch.optim.Rprop(SHARED.parameters())),
                problem("b", loss=reading("a", "b")),
            ],
            [mlo.Edge("a", "b"), mlo.Edge("b", "a")],
        ),
        r"level 'a': FiniteDifference\(.*\) differentiates the optimizer.*; expected one of SGD, Adam, .*; found Rprop",
    ),
    "complex parameters": (
        lambda: mlo.Graph([problem("a", nn.Linear(2, 2, dtype=torch.complex64))]),
        "level 'a': expected real parameters; found weight, of torch.complex64. .* torch.view_as_complex",
    ),
    "one level": (lambda: mlo.Graph(problem("a")), "levels: expected a list; found one Problem. Put it into brackets"),
    "one edge": (
        lambda: mlo.Graph([problem("a"), problem("b")], mlo.Edge("a", "b")),
        "edges: expected a list; found one Edge. Put it into brackets",
    ),
    "name": (lambda: problem("my level"), "a level's name must be a Python identifier .* found 'my level'"),
    "reserved name": (lambda: problem("progress"), "other than 'progress'"),
    "module": (
        lambda: mlo.Problem("a", 3, print, None, None),
        "level 'a': module must be a torch.nn.Module; found 3",
    ),
    "loss": (lambda: problem("a", loss=3), "level 'a': loss must be a callable"),
    "optimizer": (
        lambda: problem("a", optimizer=torch.ones(1)),
        "level 'a': optimizer must be a torch.optim.Optimizer",
    ),
    "data": (
        lambda: mlo.Problem("a", SHARED, print, torch.optim.SGD(SHARED.parameters()), 7),
        "level 'a': data must be an iterable of batches, or None; found 7",
    ),
    "hypergradient": (
        lambda: problem("a", hypergradient="unroll"),
        "level 'a': hypergradient must be an estimator object such as mlo.FiniteDifference",
    ),
    "hypergradient class": (lambda: problem("a", hypergradient=mlo.Unroll), "must be an estimator object"),
    "steps": (lambda: problem("a", steps=0), "level 'a': steps must be a whole number of at least 1; found 0"),
    "steps type": (lambda: problem("a", steps=True), "level 'a': steps must be a whole number"),
    "clip_norm": (
        lambda: problem("a", clip_norm=-1.0),
        "level 'a': clip_norm must be a positive number, or None; found -1.0",
    ),
    "scheduler": (lambda: problem("a", scheduler="cosine"), "level 'a': scheduler must be a learning-rate scheduler"),
    "plateau scheduler": (
        lambda: problem(
            "a",
            SHARED,
            optimizer=(sgd := torch.optim.SGD(SHARED.parameters(), lr=1.0)),
            scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(sgd),
        ),
        "level 'a': scheduler must be one that steps without a metric",
    ),
    "foreign scheduler": (
        lambda: problem(
            "a", scheduler=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(SHARED.parameters(), lr=1.0), 3)
        ),
        "level 'a': its scheduler drives another optimizer",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_declaration(mistake):
    build, message = MISTAKES[mistake]
    with pytest.raises(mlo.GraphError, match=message.replace("?", r"\?") if "Did you" in message else message):
        build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_that_are_too_coarse_for_differences(dtype):
    def build(estimator):
        low = nn.Linear(2, 2, dtype=dtype)
        levels = [
            problem("a", low, loss=reading("a", "b"), hypergradient=estimator),
            problem("b", nn.Linear(2, 2, dtype=torch.bfloat16), loss=reading("a", "b")),
        ]
        return mlo.Graph(levels, [mlo.Edge("a", "b"), mlo.Edge("b", "a")])

    for estimator in (mlo.FiniteDifference(), mlo.SAMA(), mlo.Penalty()):
        if dtype == torch.float32:
            build(estimator)
        else:
            with pytest.warns(
                RuntimeWarning, match=rf"level 'a', {type(estimator).__name__}: .* found {dtype}, in which"
            ):
                build(estimator)
    build(mlo.Unroll())
    build(mlo.FirstOrder())


@pytest.mark.parametrize("act", ["run", "hypergradient"])
def test_mistakes_that_one_call_of_each_loss_shows(act):
    def go(graph):
        engine = mlo.Engine(graph, device="cpu")
        return engine.run(1, progress=False) if act == "run" else engine.hypergradient("b")

    a, b = problem("a"), problem("b", loss=reading("a", "b"))
    with pytest.raises(
        mlo.GraphError, match=r"the loss of level 'b' reads levels.c; it may read b, a. Declare mlo.Edge\('c', 'b'\)"
    ):
        go(mlo.Graph([a, problem("b", loss=reading("b", "c"))], [mlo.Edge("a", "b")]))
    with pytest.raises(
        mlo.GraphError,
        match=r"edge 'b' -> 'a': expected the loss of 'a' to read levels.b; one call of it read a. Remove",
    ):
        go(mlo.Graph([a, b], [mlo.Edge("a", "b"), mlo.Edge("b", "a")]))
    wrong_losses = (
        (lambda levels, batch: levels.a(torch.ones(2, 1)), r"shape \(2, 1\), torch.float32"),
        (lambda levels, batch: 3.0, "float"),
        (lambda levels, batch: None, "NoneType"),
        (lambda levels, batch: torch.ones((), dtype=torch.int64), r"shape \(\), torch.int64"),
    )
    for bad, found in wrong_losses:
        wrong = problem("a", loss=bad)
        with pytest.raises(
            mlo.GraphError, match=f"the loss of level 'a' must return one floating-point number.*{found}"
        ):
            go(mlo.Graph([wrong, b], [mlo.Edge("a", "b")]))


def test_a_detached_edge_is_read_by_value_and_puts_nothing_inside():
    graph = pair(edges=[mlo.Edge("a", "b"), mlo.Edge("b", "a", detached=True)])
    assert graph.inside("b") == frozenset()
    engine = mlo.Engine(graph, device="cpu")
    engine.run(1, progress=False)
    with pytest.raises(mlo.GraphError):
        graph.inside("c")
    with pytest.raises(mlo.GraphError):
        graph["c"]


def test_hooks_on_the_step_of_an_optimizer_are_refused_where_it_is_differentiated():
    def declared(estimator):
        module = nn.Linear(1, 1).double()
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        sgd.register_step_post_hook(lambda *_: module.weight.data.clamp_(-0.1, 0.1))
        a = problem("a", module, loss=reading64("a", "b"), optimizer=sgd, hypergradient=estimator)
        b = problem("b", nn.Linear(1, 1).double(), loss=reading64("a", "b"))
        return mlo.Graph([a, b], [mlo.Edge("a", "b"), mlo.Edge("b", "a")]), sgd

    with pytest.raises(mlo.GraphError, match="found SGD with hooks"):
        declared(mlo.Unroll())
    mlo.Engine(declared(mlo.FirstOrder())[0], device="cpu").run(1, progress=False)


def test_hooks_on_the_step_that_come_later_are_refused_too():
    module = nn.Linear(1, 1).double()
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    a = problem("a", module, loss=reading64("a", "b"), optimizer=sgd, hypergradient=mlo.Unroll())
    b = problem("b", nn.Linear(1, 1).double(), loss=reading64("a", "b"))
    engine = mlo.Engine(mlo.Graph([a, b], [mlo.Edge("a", "b"), mlo.Edge("b", "a")]), device="cpu")
    engine.run(1, progress=False)
    sgd.register_step_pre_hook(lambda *_: None)
    with pytest.raises(mlo.MloError, match=r"SGD: expected one of .* without hooks on its step"):
        engine.run(1, progress=False)


def test_an_optimizer_may_be_taught():
    class Halving(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=group["lr"] / 2)

    module = nn.Linear(1, 1).double()

    def declared():
        a = problem(
            "a",
            module,
            loss=reading64("a", "b"),
            optimizer=Halving(module.parameters(), lr=0.1),
            hypergradient=mlo.Unroll(),
        )
        return mlo.Graph([a, problem("b", nn.Linear(1, 1).double(), loss=reading64("a", "b"))],
                         [mlo.Edge("a", "b"), mlo.Edge("b", "a")])  # fmt: skip

    with pytest.raises(mlo.GraphError, match="found Halving"):
        declared()
    mlo.register_optimizer(Halving, lambda w, g, state, options: (w - options["lr"] / 2 * g, {}))
    assert mlo.Engine(declared(), device="cpu").hypergradient("b")["weight"].isfinite().all()


def reading64(*names):
    return lambda levels, batch: sum(getattr(levels, n)(batch.double()).sum() ** 2 for n in names)


@pytest.mark.parametrize("estimator", [mlo.SAMA(), mlo.Penalty(), mlo.Unroll()], ids=repr)
def test_an_estimator_of_steps_refuses_an_optimizer_that_it_does_not_know(estimator):
    lower, upper = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

    def loss(levels, batch):
        return (levels.lower.weight - levels.upper.weight).square().sum()

    problems = [
        mlo.Problem("lower", lower, loss, torch.optim.RMSprop(lower.parameters()), None, hypergradient=estimator),
        mlo.Problem("upper", upper, loss, torch.optim.SGD(upper.parameters(), lr=0.1), None),
    ]
    with pytest.raises(mlo.GraphError, match=r"'lower'.*found RMSprop. Change the optimizer"):
        mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
