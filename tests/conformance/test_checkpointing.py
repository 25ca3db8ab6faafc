"""`Unroll(checkpoint=True)`: the same number, with memory that grows as the square root of the number of steps."""

import gc

import pytest
import torch
from torch.nn.functional import mse_loss

import mlo
from tests.toys import assert_same_state, state_of, three_levels

from .quadratics import relative_error
from .random_graphs import draw_graph, flat


@pytest.mark.parametrize("last", [None, 1, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_number_is_that_of_plain_unrolling(steps, last):
    """With dropout, batch normalization, momentum, Adam, schedulers, clipping and other buffers."""
    plain, thin = (
        three_levels(estimator=mlo.Unroll(last=last, checkpoint=checkpoint), steps=steps)
        for checkpoint in (False, True)
    )
    for _ in range(2):
        a, b = (flat(engine.hypergradient("gate").values()) for engine in (thin, plain))
        assert relative_error(a.double(), b.double()) < 1e-5  # float32
        before = state_of(thin)
        thin.hypergradient("gate")
        assert_same_state(before, state_of(thin))
        thin.run(1, progress=False)
        plain.run(1, progress=False)


@pytest.mark.parametrize("seed", range(6))
def test_nests(seed):
    graph = draw_graph(seed, 3, nested=True)
    graph.steps = dict.fromkeys(graph.names, 4)
    plain, thin = (graph.engine(mlo.Unroll(checkpoint=checkpoint)) for checkpoint in (False, True))
    a, b = (flat(engine.hypergradient(graph.names[-1]).values()) for engine in (thin, plain))
    assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_recomputed_in_it(precision):
    plain, thin = (
        three_levels(estimator=mlo.Unroll(checkpoint=checkpoint), steps=5, precision=precision)
        for checkpoint in (False, True)
    )
    a, b = (flat(engine.hypergradient("gate").values()).double() for engine in (thin, plain))
    assert relative_error(a, b) < 1e-4


class Wide(torch.nn.Module):
    """Many weights, cheap to run."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 1000, dtype=torch.float64))


def peak_of_live_copies(steps, *, checkpoint):
    """The largest number of weight-sized tensors alive at any loss call of one hypergradient."""
    lower, upper = Wide(), torch.nn.Linear(1, 1).double()
    peak = 0

    def train(levels, batch):
        nonlocal peak
        gc.collect()
        alive = {t.untyped_storage().data_ptr() for t in gc.get_objects() if _is_wide(t)}
        peak = max(peak, len(alive))
        return (levels.lower.w.tanh() - levels.upper.weight).square().mean()

    def validate(levels, batch):
        return mse_loss(levels.lower.w, torch.ones(1000, dtype=torch.float64))

    adam = torch.optim.Adam(lower.parameters(), lr=0.01)
    problems = [
        mlo.Problem("lower", lower, train, adam, None, hypergradient=mlo.Unroll(checkpoint=checkpoint), steps=steps),
        mlo.Problem("upper", upper, validate, torch.optim.SGD(upper.parameters(), lr=0.1), None),
    ]
    graph = mlo.Graph(problems, [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")])
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    try:
        mlo.Engine(graph, seed=0, device="cpu").hypergradient("upper")
    finally:
        gc.unfreeze()
    return peak


def _is_wide(found):
    return issubclass(type(found), torch.Tensor) and found.numel() == 1000  # isinstance asks what proxies stand for


def test_memory_grows_as_the_square_root_of_the_steps():
    thin = {steps: peak_of_live_copies(steps, checkpoint=True) for steps in (4, 16, 64, 144)}
    plain = {steps: peak_of_live_copies(steps, checkpoint=False) for steps in (16, 64)}
    assert plain[64] > 3 * plain[16]  # proportional to the steps
    # a + b sqrt(steps): equal differences between sqrt = 4, 8, 12
    assert 0.8 < (thin[144] - thin[64]) / (thin[64] - thin[16]) < 1.25
    assert thin[64] < plain[64] / 2.5


@pytest.mark.parametrize(
    "inner", [mlo.ConjugateGradient(iterations=1, warm_start=True), mlo.Neumann(terms=2, scale=0.1, warm_start=True)]
)
def test_a_nest_whose_estimators_remember(inner):
    """The gradients that the steps took are not to be had again by another sweep, and so they are kept."""

    def hypergradient(checkpoint):
        graph = draw_graph(0, 3, nested=True)
        graph.steps = dict.fromkeys(graph.names, 4)
        estimators = {name: inner if name == "level0" else mlo.Unroll(checkpoint=checkpoint) for name in graph.names}
        engine = graph.engine(estimators)
        engine.run(2, progress=False)
        return flat(engine.hypergradient("level2").values())

    assert relative_error(hypergradient(True), hypergradient(False)) < 1e-12
