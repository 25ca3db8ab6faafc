"""Time over depth: chains of diamonds, in which the number of paths doubles with each diamond.

One step is a whole round: a step of each of the 3 L lower levels, the hypergradient of the top, its step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import mlo
from tests.conformance.diamonds import RATE, Diamonds
from tests.conformance.quadratics import Vector

from ..accuracy import Notes
from .report import Benchmark, Result, agree, difference, line_chart, raw, size_table, spread
from .timing import Method, Work, measure

AGREEMENT = 1e-9


def by_hand(size: int) -> Work:
    """All lower steps in one graph that is kept, and one backward pass."""
    diamonds = Diamonds(size, mlo.Unroll())

    def work(num: int) -> None:
        for _ in range(num):
            diamonds.exact()

    return work


def with_mlo(size: int) -> Work:
    engine = Diamonds(size, mlo.Unroll()).engine()
    return lambda num: engine.run(num, progress=False)


def with_betty(size: int) -> Work:
    """`ImplicitProblem`, `darts`: two gradients for each level on each path."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    diamonds = Diamonds(size, mlo.Unroll())

    class Level(ImplicitProblem):
        def get_batch(self):
            return ()

        def training_step(self, batch):
            return diamonds.value(self.name, {q: levels[q]() for q in (self.name, *diamonds.reads[self.name])})

    levels = {}
    for name, value in diamonds.start.items():
        module = Vector(value.tolist())
        sgd = torch.optim.SGD(module.parameters(), lr=RATE)
        levels[name] = Level(name, Config(type="darts", retain_graph=True), module, sgd)
    upward: dict[Level, list[Level]] = {}
    for target, sources in diamonds.reads.items():
        for source in sources:
            if source != "top":
                upward.setdefault(levels[source], []).append(levels[target])
    downward = {levels["top"]: [levels[name] for name in diamonds.lower]}
    engine = Engine(list(levels.values()), EngineConfig(strategy="cpu"), {"u2l": downward, "l2u": upward})

    def work(num: int) -> None:
        engine.train_iters = num
        engine.run()

    return work


METHODS = (
    Method("by hand", "", by_hand, "one graph over all lower steps, one backward pass, no step of any optimizer"),
    Method("mlo Unroll()", "mlo", with_mlo),
    Method("Betty darts", "Betty", with_betty, "goes along each path on its own"),
)


def check(size: int) -> float:
    """Compare mlo's hypergradient with that of the graph by hand."""
    diamonds = Diamonds(size, mlo.Unroll())
    error = difference([diamonds.engine().hypergradient("top")["w"]], [diamonds.exact()])
    agree(f"hypergradients of {size} diamonds", error, AGREEMENT)
    return error


def run(methods: Sequence[Method], quick: bool) -> Result:
    sizes = (1, 2, 3) if quick else (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
    turns, cap = (3, 0.5) if quick else (5, 20.0)
    worst = max(check(size) for size in sizes)
    found = measure(methods, sizes, repeats=turns, num=lambda size: 1 if quick else max(1, 8 // size), cap=cap)
    notes = Notes()
    table = size_table(methods, found, "diamonds", lambda one: spread([1000 * s for s in one.seconds]), notes)
    series = {
        m.name: [(one.size, one.median) for one in found if one.method == m.name and not one.error] for m in methods
    }
    text = (
        f"Milliseconds a round over the number of diamonds L; there are 3 L + 1 levels and 2^L paths from the lowest "
        f"level to the top. Median and range of {turns} turns; cap {cap:g} s a round. mlo's hypergradients agree with "
        f"those by hand to {worst:.0e} at all sizes."
    )
    return Result(
        "\n".join([text, "", *table, "", *notes.lines()]),
        {"agreement": worst, "measured": raw(found)},
        {"depth": line_chart(series, "diamonds", "seconds a round", logarithmic=(True, True))},
    )


BENCHMARK = Benchmark("depth", "Depth: chains of diamonds", run, METHODS)
