"""A chain of diamonds: as many levels as one likes, and exponentially many paths through them."""

from collections import Counter

import torch

import mlo

from .quadratics import Vector

RATE = 0.35


class Diamonds:
    """A chain of diamonds: `base` is read by `left` and `right`, which the next base reads, or the top in the end.

    All lower levels read the top as well. A path to the top has a choice of two in each diamond: 2^num in all. What
    goes through a diamond is neither damped nor amplified: (2 * RATE)^2 along each of two ways.
    """

    def __init__(self, num, estimator):
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
        self.losses, self.estimator = Counter(), estimator

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
