"""Time and memory over the number of steps that a hypergradient goes back through.

One unit of work is one hypergradient: K steps of SGD with momentum from the same start, the held-out loss, and its
derivative with respect to the weighting net. Each method leaves the classifier as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call

import mlo

from ..accuracy import Notes
from .bilevel import Batch, Bilevel, fit, judge, made_up
from .memory import peak
from .report import Benchmark, Result, agree, difference, line_chart, raw, size_table, spread
from .timing import Measured, Method, Work, measure
from .trainers import unrolled

Hypergradient = Callable[[], Sequence[Tensor]]


def batches_of(problem: Bilevel) -> list[Batch]:
    return [problem.training[i % len(problem.training)] for i in range(problem.steps)]


def by_hand(problem: Bilevel) -> Hypergradient:
    batches, upper = batches_of(problem), list(problem.upper.parameters())

    def compute() -> Sequence[Tensor]:
        weights, _ = unrolled(problem, (dict(problem.lower.named_parameters()), None), batches)
        return torch.autograd.grad(judge(partial(functional_call, problem.lower, weights), problem.held_out[0]), upper)

    return compute


def with_mlo(problem: Bilevel, estimator: mlo.Hypergradient) -> Hypergradient:
    engine = problem.engine(estimator)
    return lambda: list(engine.hypergradient("upper").values())


def with_torchopt(problem: Bilevel) -> Hypergradient:
    """`MetaSGD`, `extract_state_dict` before and `recover_state_dict` after."""
    import torchopt

    batches, upper = batches_of(problem), list(problem.upper.parameters())

    def compute() -> Sequence[Tensor]:
        sgd = torchopt.MetaSGD(problem.lower, lr=problem.rate, momentum=problem.momentum)
        before = torchopt.extract_state_dict(problem.lower, by="reference")
        for batch in batches:
            sgd.step(fit(problem.lower, problem.upper, batch))
        found = torch.autograd.grad(judge(problem.lower, problem.held_out[0]), upper)
        torchopt.recover_state_dict(problem.lower, before)
        return found

    return compute


def with_higher(problem: Bilevel) -> Hypergradient:
    """`innerloop_ctx`."""
    import higher

    batches, upper, sgd = batches_of(problem), list(problem.upper.parameters()), problem.sgd()

    def compute() -> Sequence[Tensor]:
        with higher.innerloop_ctx(problem.lower, sgd) as (functional, steps):
            for batch in batches:
                steps.step(fit(functional, problem.upper, batch))
            return torch.autograd.grad(judge(functional, problem.held_out[0]), upper)

    return compute


BY_HAND = "by hand"
WAYS: dict[str, Callable[[Bilevel], Hypergradient]] = {
    BY_HAND: by_hand,
    "mlo Unroll(graphs=None)": partial(with_mlo, estimator=mlo.Unroll(graphs=None)),
    "mlo Unroll()": partial(with_mlo, estimator=mlo.Unroll()),
    "mlo Unroll(checkpoint=True)": partial(with_mlo, estimator=mlo.Unroll(checkpoint=True)),
    "TorchOpt MetaSGD": with_torchopt,
    "higher innerloop_ctx": with_higher,
}
LIBRARIES = {"mlo": "mlo", "TorchOpt": "TorchOpt", "higher": "higher"}


def prepare(name: str, size: int) -> Work:
    compute = WAYS[name](made_up(size))

    def work(num: int) -> None:
        for _ in range(num):
            compute()

    return work


METHODS = tuple(Method(name, LIBRARIES.get(name.split()[0], ""), partial(prepare, name)) for name in WAYS)


def check(methods: Sequence[Method], size: int) -> float:
    """Compare the hypergradients in float64, each computed twice, with that by hand; return the worst difference."""
    expected = WAYS[BY_HAND](made_up(size, dtype=torch.float64))()
    worst = 0.0
    for method in methods:
        compute = WAYS[method.name](made_up(size, dtype=torch.float64))
        for found in (compute(), compute()):
            error = difference(found, expected)
            agree(f"{method.name}, {size} steps", error, 1e-7)
            worst = max(worst, error)
    return worst


def run(methods: Sequence[Method], quick: bool) -> Result:
    sizes = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    turns = 3 if quick else 7
    worst = max(check(methods, size) for size in sizes)
    found = measure(methods, sizes, repeats=turns, num=lambda size: 1 if quick else max(1, 32 // size))
    by_name = {m.name: m for m in methods}
    for one in found:
        if not one.error and (not quick or one.size == sizes[-1]):
            one.mebibytes, one.error = peak(by_name[one.method], one.size, sizes[0])
    notes = Notes()

    def memory(one: Measured) -> str:
        return "-" if one.mebibytes is None else f"{one.mebibytes:.1f}"

    def series(value: Callable[[Measured], float | None]) -> dict[str, list[tuple[float, float]]]:
        points = {
            m.name: [(one.size, value(one)) for one in found if one.method == m.name and not one.error] for m in methods
        }
        return {name: [(x, y) for x, y in own if y is not None] for name, own in points.items()}

    times = size_table(methods, found, "K", lambda one: spread([1000 * s for s in one.seconds]), notes)
    text = (
        f"Milliseconds for one hypergradient through K steps, median and range of {turns} turns. All agree with the "
        f"one by hand to {worst:.0e} in float64, at all sizes."
    )
    above = "Peak memory above what was held before, in MiB; a process of its own for each number."
    memories = size_table(methods, found, "K", memory, notes)
    steps, seconds = "steps K", "seconds for one hypergradient"
    return Result(
        "\n".join([text, "", *times, "", above, "", *memories, "", *notes.lines()]),
        {"agreement": worst, "measured": raw(found)},
        {
            "unroll-time": line_chart(series(lambda one: one.median), steps, seconds, logarithmic=(True, True)),
            "unroll-memory": line_chart(series(lambda one: one.mebibytes), steps, "MiB", logarithmic=(True, True)),
        },
    )


BENCHMARK = Benchmark("unroll", "Length: hypergradients through K steps", run, METHODS)
