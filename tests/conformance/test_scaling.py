"""The cost of one hypergradient is linear in the levels and edges, not in the paths through the graph."""

import time
from collections import Counter

import pytest
import torch

import mlo

from .quadratics import Vector, relative_error

RATE = 0.35


class Counted(mlo.Hypergradient):
    """Unrolls, and counts its pullbacks."""

    def __init__(self):
        self.calls = Counter()

    def pullback(self, cotangent, response):
        self.calls[response.level] += 1
        return mlo.Unroll().pullback(cotangent, response)


class Diamonds:
    """A chain of diamonds: `base` is read by `left` and `right`, which the next base reads, or the top in the end.

    All lower levels read the top as well. A path to the top has a choice of two in each diamond: 2^num in all. What
    goes through a diamond is neither damped nor amplified: (2 * RATE)^2 along each of two ways.
    """

    def __init__(self, num):
        self.reads, last = {}, ()
        for i in range(num):
            self.reads[f"base{i}"] = (*last, "top")
            self.reads |= {f"{side}{i}": (f"base{i}", "top") for side in ("left", "right")}
            last = (f"left{i}", f"right{i}")
        self.reads["top"] = last
        generator = torch.Generator().manual_seed(num)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.start = {name: draw(3) for name in self.reads}
        self.matrices = {name: torch.linalg.qr(draw(3, 3)).Q for name in self.reads}
        self.losses, self.estimator = Counter(), Counted()

    @property
    def lower(self):
        return [name for name in self.reads if name != "top"]

    def value(self, name, w):
        """The loss of a level at the values of itself and of what it reads."""
        read = torch.stack([w[q] for q in self.reads[name]]).sum(0)
        return (w[name] - self.matrices[name] @ (read + 0.3 * read.sin())).square().sum() + 0.1 * w[name].cos().sum()

    def engine(self):
        def loss(name):
            def compute(levels, _):
                self.losses[name] += 1
                return self.value(name, {q: getattr(levels, q)() for q in (name, *self.reads[name])})

            return compute

        problems = []
        for name in self.reads:
            module = Vector(self.start[name].tolist())
            sgd = torch.optim.SGD(module.parameters(), lr=RATE)
            problems.append(mlo.Problem(name, module, loss(name), sgd, None, hypergradient=self.estimator))
        edges = [mlo.Edge(source, target) for target, sources in self.reads.items() for source in sources]
        return mlo.Engine(mlo.Graph(problems, edges), seed=0, device="cpu")

    def exact(self):
        """One differentiable step of each lower level, lowest first, then the gradient of the top's loss."""
        w = {name: value.clone().requires_grad_() for name, value in self.start.items()}
        top = w["top"]
        for name in self.lower:
            (gradient,) = torch.autograd.grad(self.value(name, w), w[name], create_graph=True)
            w[name] = w[name].detach() - RATE * gradient
        return torch.autograd.grad(self.value("top", w), top)[0]


def counts(num):
    """How often each lower level's loss and pullback are called in one hypergradient, and the top's loss."""
    diamonds = Diamonds(num)
    engine = diamonds.engine()
    structure = engine.graph.structure
    assert [name for name, inside in structure.inside.items() if inside] == ["top"]
    assert set(structure.inside["top"]) == set(diamonds.lower)
    engine.hypergradient("top")
    diamonds.losses.clear()  # the first one also traces what each loss reads
    diamonds.estimator.calls.clear()
    engine.hypergradient("top")
    top = diamonds.losses.pop("top")
    return diamonds.losses, diamonds.estimator.calls, top


def test_the_number_of_calls_is_linear_in_the_levels():
    each = set()
    for num in (4, 16, 64):
        losses, pullbacks, top = counts(num)
        assert len(losses) == len(pullbacks) == 3 * num
        assert set(pullbacks.values()) == {1}
        assert top == 1
        each |= set(losses.values())
    assert each == {2}  # one call for the step, one for the products with all that the level reads


def test_the_time_is_linear_in_the_levels():
    """Time of the processor, best of three, taken in turns: other processes matter less."""
    engines = {num: Diamonds(num).engine() for num in (16, 64)}
    taken = {num: [] for num in engines}
    for _ in range(4):
        for num, engine in engines.items():
            start = time.process_time()
            engine.hypergradient("top")
            taken[num].append(time.process_time() - start)
    fewer, more = (min(times[1:]) for times in taken.values())  # the first also traces what each loss reads
    assert more / fewer < 4 * 1.8


@pytest.mark.parametrize("num", [1, 8])
def test_every_path_counts(num):
    diamonds = Diamonds(num)
    assert relative_error(diamonds.engine().hypergradient("top")["w"], diamonds.exact()) < 1e-9
