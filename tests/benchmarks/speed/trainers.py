"""One round of training both levels of a `Bilevel` problem, by hand and by each library, as its documentation says.

Each function takes the problem, whose modules it trains in place, and returns `work(num)`, which plays `num` rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import mlo

from .bilevel import Batch, Bilevel, fit, judge
from .timing import Work

Product = Callable[[Bilevel, list[Tensor], Batch, list[Tensor]], Sequence[Tensor]]
"""`product(problem, start, batch, direction)`: d/d upper <d fit/d lower at `start`, direction>."""


def with_mlo(problem: Bilevel, estimator: mlo.Hypergradient) -> Work:
    engine = problem.engine(estimator)
    return lambda num: engine.run(num, progress=False)


def by_differences(problem: Bilevel, start: list[Tensor], batch: Batch, direction: list[Tensor]) -> Sequence[Tensor]:
    """Central differences around the weights before the step (DARTS, eq. 8)."""
    weights, upper = list(problem.lower.parameters()), list(problem.upper.parameters())
    length = 0.01 / torch.cat([d.flatten() for d in direction]).norm()
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for w, s, d in zip(weights, start, direction, strict=True):
                w.copy_(s + sign * length * d)
        sides.append(torch.autograd.grad(fit(problem.lower, problem.upper, batch), upper))
    return [(a - b) / (2 * length) for a, b in zip(*sides, strict=True)]


def by_double_backward(
    problem: Bilevel, start: list[Tensor], batch: Batch, direction: list[Tensor]
) -> Sequence[Tensor]:
    """The same exactly."""
    weights, upper = list(problem.lower.parameters()), list(problem.upper.parameters())
    with torch.no_grad():
        for w, s in zip(weights, start, strict=True):
            w.copy_(s)
    gradient = torch.autograd.grad(fit(problem.lower, problem.upper, batch), weights, create_graph=True)
    return torch.autograd.grad(gradient, upper, direction)


def by_hand(problem: Bilevel, product: Product) -> Work:
    """Go back through the last step of SGD, d w'/d gradient = -rate, with one second-order product."""
    sgd, adam = problem.sgd(), problem.adam()
    weights, upper = list(problem.lower.parameters()), list(problem.upper.parameters())
    losses = []

    def work(num: int) -> None:
        for _ in range(num):
            for _ in range(problem.steps):
                batch = next(problem.next_training)
                start = [w.detach().clone() for w in weights]
                loss = fit(problem.lower, problem.upper, batch)
                for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    w.grad = g
                sgd.step()
            held_out = judge(problem.lower, next(problem.next_held_out))
            direction = [-problem.rate * g for g in torch.autograd.grad(held_out, weights)]
            after = [w.detach().clone() for w in weights]
            gradient = product(problem, start, batch, direction)
            with torch.no_grad():
                for w, a in zip(weights, after, strict=True):
                    w.copy_(a)
            for v, g in zip(upper, gradient, strict=True):
                v.grad = g
            adam.step()
            losses.append((loss.item(), held_out.item()))

    return work


Steps = tuple[dict[str, Tensor], list[Tensor] | None]
"""Weights by name, and momentum buffers."""


def unrolled(problem: Bilevel, start: Steps, batches: Sequence[Batch]) -> Steps:
    """Differentiable steps of SGD with momentum, one a batch."""
    weights, buffers = start
    for batch in batches:
        loss = fit(partial(functional_call, problem.lower, weights), problem.upper, batch)
        gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        buffers = (
            list(gradient)
            if buffers is None
            else [problem.momentum * b + g for b, g in zip(buffers, gradient, strict=True)]
        )
        weights = {name: w - problem.rate * b for (name, w), b in zip(weights.items(), buffers, strict=True)}
    return weights, buffers


def by_hand_unrolled(problem: Bilevel) -> Work:
    """Keep the graph of all steps of a round, and go back through them at once."""
    adam, upper = problem.adam(), list(problem.upper.parameters())
    parameters = dict(problem.lower.named_parameters())
    buffers: list[Tensor] | None = None
    losses = []

    def work(num: int) -> None:
        nonlocal buffers
        for _ in range(num):
            batches = [next(problem.next_training) for _ in range(problem.steps)]
            weights, buffers = unrolled(problem, (parameters, buffers), batches)
            loss = judge(partial(functional_call, problem.lower, weights), next(problem.next_held_out))
            for v, g in zip(upper, torch.autograd.grad(loss, upper), strict=True):
                v.grad = g
            adam.step()
            with torch.no_grad():
                for name, w in weights.items():
                    parameters[name].copy_(w)
            buffers = [b.detach() for b in buffers or ()]
            losses.append(loss.item())

    return work


def with_torchopt(problem: Bilevel) -> Work:
    """`MetaSGD`, `stop_gradient`."""
    import torchopt

    adam = problem.adam()
    sgd = torchopt.MetaSGD(problem.lower, lr=problem.rate, momentum=problem.momentum)
    losses = []

    def work(num: int) -> None:
        for _ in range(num):
            for _ in range(problem.steps):
                sgd.step(fit(problem.lower, problem.upper, next(problem.next_training)))
            loss = judge(problem.lower, next(problem.next_held_out))
            adam.zero_grad()
            loss.backward(inputs=list(problem.upper.parameters()))
            adam.step()
            torchopt.stop_gradient(problem.lower)
            torchopt.stop_gradient(sgd)
            losses.append(loss.item())

    return work


def with_higher(problem: Bilevel) -> Work:
    """`innerloop_ctx` in each round; weights and momentum are then written back by hand, which it does not do."""
    import higher

    sgd, adam = problem.sgd(), problem.adam()
    weights = list(problem.lower.parameters())
    losses = []

    def work(num: int) -> None:
        for _ in range(num):
            with higher.innerloop_ctx(problem.lower, sgd) as (functional, steps):
                for _ in range(problem.steps):
                    steps.step(fit(functional, problem.upper, next(problem.next_training)))
                loss = judge(functional, next(problem.next_held_out))
                adam.zero_grad()
                loss.backward(inputs=list(problem.upper.parameters()))
                adam.step()
                with torch.no_grad():
                    for w, new in zip(weights, functional.parameters(), strict=True):
                        w.copy_(new)
                for index, own in steps.state[0].items():
                    sgd.state[weights[index]]["momentum_buffer"] = own["momentum_buffer"].detach()
            losses.append(loss.item())

    return work


def with_betty(problem: Bilevel, kind: str, **settings: Any) -> Work:
    """`ImplicitProblem`, one estimator of `betty.hypergradient`."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Lower(ImplicitProblem):
        def get_batch(self):
            return next(problem.next_training)

        def training_step(self, batch):
            return fit(self, self.upper, batch)

    class Upper(ImplicitProblem):
        def get_batch(self):
            return next(problem.next_held_out)

        def training_step(self, batch):
            return judge(self.lower, batch)

    config = Config(type=kind, unroll_steps=problem.steps, **settings)
    lower = Lower("lower", config, problem.lower, problem.sgd())
    upper = Upper("upper", Config(retain_graph=True), problem.upper, problem.adam())
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine([lower, upper], EngineConfig(strategy="cpu"), dependencies)

    def work(num: int) -> None:
        engine.train_iters = num * problem.steps
        engine.run()

    return work
