"""Laws that hold for every estimator, whatever the problem."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

import mlo
from mlo.hypergradients import KINDS

from .quadratics import oracle, quadratic_engine, relative_error
from .random_graphs import draw_graph, fit, flat

ARGUMENTS = {
    "finite_difference": {"last": None},
    "neumann": {"terms": 60},
    "cg": {"tolerance": 1e-13, "iterations": 60},  # not linear in its right-hand side before it has converged
    "nystrom": {"rank": 1000, "damping": 1e-8},
}
ESTIMATORS = {kind: estimator(**ARGUMENTS.get(kind, {})) for kind, estimator in KINDS.items()}
DIFFERENCES = {"finite_difference", "penalty", "sama"}  # of first derivatives: linear for quadratics only


def estimators(*, without=frozenset()):
    return pytest.mark.parametrize("kind", [kind for kind in ESTIMATORS if kind not in without])


# --- a diamond of tanh networks ---------------------------------------------------------------------------------------

DIAMOND = {"base": ("top",), "left": ("base", "top"), "right": ("base", "top"), "top": ("left", "right")}


def diamond(estimator, *, dtype=torch.float64, names=tuple(DIAMOND), shuffle=None, **options):
    """The top's hypergradient; weight decay makes the curvature of the lower levels positive."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    modules, batches = {}, {}
    for name in DIAMOND:
        modules[name] = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(dtype)
        with torch.no_grad():
            for p in modules[name].parameters():
                p.copy_(0.4 * draw(*p.shape))
        batches[name] = [(draw(5, 3), draw(5, 3)) for _ in range(2)]

    def predict(levels, batch):
        x, y = batch
        return mse_loss(levels.left(x) + levels.right(x) + levels.top(x), y)

    def problem(name):
        loss = predict if name == "top" else fit(name, DIAMOND[name])
        sgd = torch.optim.SGD(modules[name].parameters(), lr=0.1, momentum=0.5, weight_decay=2.0)
        return mlo.Problem(name, modules[name], loss, sgd, batches[name], hypergradient=estimator, steps=3)

    edges = [mlo.Edge(source, target) for target in DIAMOND for source in DIAMOND[target]]
    if shuffle is not None:
        random.Random(shuffle).shuffle(edges)
    engine = mlo.Engine(mlo.Graph([problem(name) for name in names], edges), seed=0, device="cpu", **options)
    return flat(engine.hypergradient("top").values())


@estimators()
@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_edges_and_unrelated_levels_are_listed_does_not_matter(kind, seed):
    expected = diamond(ESTIMATORS[kind])
    found = diamond(ESTIMATORS[kind], names=("base", "right", "left", "top"), shuffle=seed)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far")  # rounding hides the short cotangent of base
@estimators()
def test_single_precision_gives_the_same_to_its_accuracy(kind):
    expected = diamond(ESTIMATORS[kind])
    found = diamond(ESTIMATORS[kind], dtype=torch.float32)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), expected) < (1e-3 if kind in DIFFERENCES else 1e-5)


@pytest.mark.filterwarnings("ignore:level .* Penalty. its solves are far")
@estimators()
def test_bf16_is_close_to_fp32(kind):
    """bf16 has 8 bits: first-order passes run in it, second-order products do not."""
    expected = diamond(ESTIMATORS[kind], dtype=torch.float32)
    found = diamond(ESTIMATORS[kind], dtype=torch.float32, precision="bf16")
    assert 0 < relative_error(found.double(), expected) < 0.03


# --- linearity of the pullback, as seen by an estimator that asks another one -----------------------------------------


class Asking(mlo.Hypergradient):
    """Pulls back through `estimator`, and keeps by how much its pullback fails to be linear."""

    def __init__(self, estimator):
        self.estimator = estimator
        self.deviations = []

    @property
    def recorded_steps(self):
        return self.estimator.recorded_steps

    @property
    def needs_update_rule(self):
        return self.estimator.needs_update_rule

    @property
    def implicit(self):
        return self.estimator.implicit

    def pullback(self, cotangent, response):
        def pulled(a):
            found = self.estimator.pullback(a, replace(response, memory={}))
            return flat(t for q in response.targets for t in found.get(q, response.zeros(q)))

        generator = torch.Generator().manual_seed(len(self.deviations))
        other = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in cotangent)
        mixed = tuple(2.5 * a - 0.7 * b for a, b in zip(cotangent, other, strict=True))
        parts = 2.5 * pulled(cotangent), -0.7 * pulled(other)
        scale = sum(float(part.norm()) for part in parts)
        self.deviations.append(float((pulled(mixed) - sum(parts)).norm()) / (scale or 1.0))
        return self.estimator.pullback(cotangent, response)


@estimators()
def test_the_pullback_of_quadratics_is_linear(kind):
    asking = Asking(ESTIMATORS[kind])

    def sgd(_, module):
        return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.5)

    quadratic_engine(oracle("lbt_implicit"), asking, sgd, 5).hypergradient("l2")
    assert len(asking.deviations) == 2
    assert max(asking.deviations) < 1e-9


@estimators(without=DIFFERENCES)
def test_the_pullback_of_networks_is_linear(kind):
    asking = Asking(ESTIMATORS[kind])
    diamond(asking)
    assert asking.deviations
    assert max(asking.deviations) < 1e-9


# --- second-order products, as a user's estimator sees them -----------------------------------------------------------


class Symmetry(mlo.Hypergradient):
    """Unrolls, and keeps |u'Hv - v'Hu| / |u'Hv| of every recorded step."""

    def __init__(self):
        self.deviations = []
        self.nested = False

    def pullback(self, cotangent, response):
        for step in response.steps:
            generator = torch.Generator().manual_seed(len(self.deviations))
            u, v = (tuple(torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in step.weights) for _ in "uv")
            hu, hv = (flat(step.product(d, (response.level,))[response.level]) for d in (u, v))
            self.deviations.append(float(((flat(u) @ hv - flat(v) @ hu) / (flat(u) @ hv)).abs().detach()))
            self.nested |= step.inner is not None
        return mlo.Unroll().pullback(cotangent, response)

    @property
    def recorded_steps(self):
        return None


@pytest.mark.parametrize(("num_levels", "nested"), [(2, False), (3, False), (4, False), (3, True)])
@pytest.mark.parametrize("seed", range(3))
def test_hessian_vector_products_are_symmetric(num_levels, nested, seed):
    """In a nest, those of the total curvature: the levels inside move with the level."""
    graph, symmetry = draw_graph(seed, num_levels, nested=nested), Symmetry()
    graph.engine(symmetry).hypergradient(graph.names[-1])
    assert symmetry.deviations
    assert symmetry.nested == nested
    assert max(symmetry.deviations) < 1e-9


class Squared(mlo.Hypergradient):
    """Pulls back through H H, with all products from one graph, or each from its own."""

    implicit = True
    recorded_steps = 1

    def __init__(self, *, shared):
        self.shared = shared

    def pullback(self, cotangent, response):
        step = response.last_step()
        if not self.shared:
            image = step.product(cotangent, (response.level,))[response.level]
            return step.product(image, response.targets)
        with step.second_order((response.level, *response.targets)) as product:
            image = product(cotangent, (response.level,), create_graph=step.create_graph)[response.level]
            return product(image, response.targets, create_graph=step.create_graph)


def test_a_direction_that_comes_from_an_earlier_product_is_no_input():
    """In a nest products are differentiated; that of a direction must not run through the weights behind it."""
    graph = draw_graph(3, 3, nested=True)
    shared, own = (
        flat(graph.engine(Squared(shared=shared)).hypergradient(graph.names[-1]).values()) for shared in (True, False)
    )
    assert relative_error(shared, own) < 1e-10
    assert relative_error(shared, flat(graph.engine(mlo.FirstOrder()).hypergradient(graph.names[-1]).values())) > 1e-3


@pytest.mark.parametrize("num_levels", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_finite_differences_is_of_second_order_in_the_radius(num_levels, seed):
    def hypergradient(estimator):
        graph = draw_graph(seed, num_levels)
        return flat(graph.engine(estimator).hypergradient(graph.names[-1]).values())

    exact = hypergradient(mlo.Unroll())
    coarse, fine = (
        relative_error(hypergradient(mlo.FiniteDifference(radius=radius, last=None)), exact) for radius in (1e-2, 1e-3)
    )
    assert 90 < coarse / fine < 110
