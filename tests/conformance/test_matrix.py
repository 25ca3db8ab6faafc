"""Every estimator on every shape of graph with every optimizer: the number that it promises."""

import pytest
import torch

import mlo
from mlo.hypergradients import KINDS

from .closed_form import GRAPHS, draw
from .quadratics import relative_error
from .random_graphs import OPTIMIZERS, build_graph, build_optimizer, flat

SHAPES = ("bilevel", "lbt", "nest", "diamond", "chain")

STEPS_TAKEN = {  # estimator, tolerance
    "unroll": (mlo.Unroll(), 1e-9),
    "unroll-checkpoint": (mlo.Unroll(checkpoint=True), 1e-9),
    "finite_difference": (mlo.FiniteDifference(radius=1e-4, last=None), 1e-7),  # 10 radius^2
    "one-sided": (mlo.FiniteDifference(radius=1e-7, last=None, one_sided=True), 1e-6),  # 10 radius
}
IMPLICIT = {  # estimator, steps of each lower level, tolerance
    "cg": (mlo.ConjugateGradient(tolerance=1e-12), 18, 1e-6),
    "neumann": (mlo.Neumann(terms=28), 18, 1e-6),
    "nystrom": (mlo.Nystrom(rank=100, damping=1e-9), 18, 1e-6),
    "penalty": (mlo.Penalty(steps=12), 12, 1e-3),
}
OTHERS = {"sama": mlo.SAMA(), "first_order": mlo.FirstOrder()}


def shapes():
    return pytest.mark.parametrize("shape", SHAPES)


def optimizers(options=OPTIMIZERS):
    return pytest.mark.parametrize("optimizer", options)


def test_no_estimator_is_left_out():
    covered = [row[0] for row in (STEPS_TAKEN | IMPLICIT).values()] + list(OTHERS.values())
    assert {type(estimator) for estimator in covered} == set(KINDS.values())


# --- tanh networks, a few steps each, warm-started, unconverged -------------------------------------------------------


def networks(shape, optimizer):
    reads = {f"level{t}": {f"level{s}" for s in sources} for t, sources in GRAPHS[shape].items()}
    return build_graph(
        1,
        reads,
        dict.fromkeys(reads, OPTIMIZERS[optimizer]),
        {name: 1 if name == max(reads) else 3 for name in reads},
        clips=dict.fromkeys(reads),
        num_batches=dict.fromkeys(reads, 2),
    )


@optimizers()
@shapes()
@pytest.mark.parametrize("kind", STEPS_TAKEN)
def test_the_derivative_of_the_steps_taken(kind, shape, optimizer):
    estimator, tolerance = STEPS_TAKEN[kind]
    graph = networks(shape, optimizer)
    top, engine = graph.names[-1], graph.engine(estimator)
    engine.run(1, progress=False)
    exact = flat(graph.reference(engine).hypergradient(top, graph.values()))
    assert relative_error(flat(engine.hypergradient(top).values()), exact) < tolerance


@optimizers()
@shapes()
def test_first_order_is_the_direct_gradient(shape, optimizer):
    """At the lower levels' weights after their steps, and the top's before its own."""
    graph = networks(shape, optimizer)
    top, engine = graph.names[-1], graph.engine(OTHERS["first_order"])
    engine.run(1, progress=False)
    reference, before = graph.reference(engine), graph.values()[top]
    found = flat(engine.hypergradient(top).values())
    engine.run(1, progress=False)
    own, level = [w.requires_grad_() for w in before], reference.by_name[top]
    loss = level.loss(graph.values() | {top: own}, level.batches[reference.drawn[top]])
    assert relative_error(found, flat(torch.autograd.grad(loss, own))) < 1e-12


# --- quadratics -------------------------------------------------------------------------------------------------------


def quadratics(shape, estimator, options, *, steps):
    """The top's hypergradient from starts away from the best responses, and the implicit one.

    The top's loss has no direct part, so that an error is one of the indirect part.
    """
    reads = GRAPHS[shape]
    top, dims = max(reads), [3, 2, 2, 2][: len(reads)]
    form = draw(1, dims, reads, 0.0 if options["kind"] == "adamw" else options.get("weight_decay", 0.0))
    own = form.block(top)
    form.q[top][own], form.q[top][:, own], form.b[top][own] = 0, 0, 0
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(sum(dims), dtype=torch.float64, generator=generator)
    engine = form.engine(start, [estimator] * len(dims), lambda _, m: build_optimizer(options, m), steps)
    return engine.hypergradient(f"l{top}")["w"], form.hypergradient(form.solution(start, top), top)


# Optimizers that come to rest at a fixed rate, in some 15 steps on these losses, whose curvature is 1 to 2. Adam does
# with an `eps` that is not small beside the gradient. AdamW's decay is no part of the objective. In a nest `Penalty`
# needs such rates: at each of its steps of a level, the levels inside are solved again.
RESTING = {
    "sgd": {"kind": "sgd", "lr": 0.55, "weight_decay": 0.1},
    "momentum": {"kind": "sgd", "lr": 0.5, "momentum": 0.15, "weight_decay": 0.1},
    "nesterov": {"kind": "sgd", "lr": 0.45, "momentum": 0.15, "nesterov": True, "weight_decay": 0.1},
    "adam": {"kind": "adam", "lr": 5.0, "betas": (0.1, 0.999), "eps": 10.0, "weight_decay": 0.1},
    "adamw": {"kind": "adamw", "lr": 5.5, "betas": (0.1, 0.999), "eps": 10.0, "weight_decay": 0.0},
}


@optimizers(RESTING)
@shapes()
@pytest.mark.parametrize("kind", IMPLICIT)
def test_the_implicit_derivative(kind, shape, optimizer):
    estimator, steps, tolerance = IMPLICIT[kind]
    found, exact = quadratics(shape, estimator, RESTING[optimizer], steps=steps)
    assert relative_error(found, exact) < tolerance


@optimizers()
@shapes()
def test_sama_is_the_last_step_of_an_unroll(shape, optimizer):
    found, exact = (
        quadratics(shape, estimator, OPTIMIZERS[optimizer], steps=3)[0]
        for estimator in (OTHERS["sama"], mlo.Unroll(last=1))
    )
    assert relative_error(found, exact) < 1e-9


@optimizers(("adam", "adamw"))
@pytest.mark.parametrize("kind", IMPLICIT)
def test_the_implicit_derivative_under_adam_as_it_is_used(kind, optimizer):
    """With an `eps` far below the gradient, at a constant rate, Adam comes to rest in hundreds of steps.

    `Penalty` needs as many. It goes on from Adam's second moment and rate of the last step, so that it is wrong where
    the rate has decayed to nothing (it does not move), and with so many steps that the second moment is forgotten
    (Adam is then no longer at rest).
    """
    estimator, _, tolerance = IMPLICIT[kind]
    if kind == "penalty":
        estimator = mlo.Penalty(steps=350)
    found, exact = quadratics("lbt", estimator, {"kind": optimizer, "lr": 0.1, "weight_decay": 0.0}, steps=350)
    assert relative_error(found, exact) < tolerance
