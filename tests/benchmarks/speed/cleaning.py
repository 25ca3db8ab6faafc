"""Accuracy over time on noisy data: scikit-learn's digits with 40 % of the training labels flipped.

All methods train the same classifier from the same start on the same batches with the same optimizers and rates, for
the same number of steps, and differ in the hypergradient alone. The clock stops while the test accuracy is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mlo

from ..accuracy import Notes
from . import trainers
from .bilevel import Batch, Bilevel, ExampleWeights, WeightNet, fit, perceptron
from .report import Benchmark, Result, line_chart
from .timing import Method, Work, guarded, timed, uncollected

FLIPPED, TRAINING, HELD_OUT, BATCH, RATE = 0.4, 1000, 400, 50, 0.02
TARGETS = (0.85, 0.9, 0.93)


@dataclass(frozen=True)
class Kind:
    """How examples are weighted, and the rate at which that is learned."""

    upper: Callable[[], nn.Module]
    rate: float


KINDS = {"cleaning": Kind(partial(ExampleWeights, TRAINING), 0.1), "reweighting": Kind(WeightNet, 0.01)}


@dataclass
class Training:
    """One method at work: `work(num)` as for `Method`, and the accuracy on the test images."""

    problem: Bilevel
    test: tuple[Tensor, Tensor]
    train: Work

    def __call__(self, num: int) -> None:
        self.train(num)

    @torch.no_grad()
    def accuracy(self) -> float:
        inputs, labels = self.test
        return float((self.problem.lower(inputs).argmax(1) == labels).float().mean())


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def problem_of(kind: str, seed: int) -> tuple[Bilevel, tuple[Tensor, Tensor]]:
    """Split, flip and shuffle by the seed; returns the problem and the test set."""
    inputs, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    first, second, third = order[:TRAINING], order[TRAINING : TRAINING + HELD_OUT], order[TRAINING + HELD_OUT :]
    flipped = torch.rand(TRAINING, generator=generator) < FLIPPED
    noise = torch.randint(1, 10, (TRAINING,), generator=generator)
    noisy = torch.where(flipped, (labels[first] + noise) % 10, labels[first])

    def batches(x: Tensor, y: Tensor, passes: int) -> list[Batch]:
        drawn = [places for _ in range(passes) for places in torch.randperm(len(x), generator=generator).split(BATCH)]
        return [(x[places], y[places], places) for places in drawn]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lower, upper = perceptron(64, 64, 10), KINDS[kind].upper()
    training, held_out = batches(inputs[first], noisy, 20), batches(inputs[second], labels[second], 20)
    problem = Bilevel(lower, upper, training, held_out, rate=RATE, upper_rate=KINDS[kind].rate)
    return problem, (inputs[third], labels[third])


def without_weights(problem: Bilevel) -> Work:
    """The lower level alone, its weights as they are at the start."""
    sgd = problem.sgd()

    def work(num: int) -> None:
        for _ in range(num * problem.steps):
            sgd.zero_grad()
            fit(problem.lower, problem.upper, next(problem.next_training)).backward(
                inputs=list(problem.lower.parameters())
            )
            sgd.step()

    return work


TRAINERS: dict[str, Callable[[Bilevel], Work]] = {
    "no upper level": without_weights,
    "mlo FiniteDifference()": partial(trainers.with_mlo, estimator=mlo.FiniteDifference()),
    "mlo ConjugateGradient": partial(
        trainers.with_mlo, estimator=mlo.ConjugateGradient(iterations=5, damping=1.0, tolerance=0.0)
    ),
    "mlo Neumann": partial(trainers.with_mlo, estimator=mlo.Neumann(terms=5, scale=RATE)),
    "mlo Unroll()": partial(trainers.with_mlo, estimator=mlo.Unroll()),
    "Betty darts": partial(trainers.with_betty, kind="darts"),
    "Betty neumann": partial(trainers.with_betty, kind="neumann", neumann_iterations=4, neumann_alpha=RATE),
    "TorchOpt MetaSGD": trainers.with_torchopt,
    "higher innerloop_ctx": trainers.with_higher,
}
LIBRARIES = {"mlo": "mlo", "Betty": "Betty", "TorchOpt": "TorchOpt", "higher": "higher"}
NOTES = {
    "mlo ConjugateGradient": "5 iterations, damping 1",
    "mlo Neumann": f"5 terms, scale {RATE}",
    "Betty neumann": f"4 iterations, which are 5 terms, alpha {RATE}",
}


def prepare(kind: str, name: str, seed: int) -> Training:
    problem, test = problem_of(kind, seed)
    return Training(problem, test, TRAINERS[name](problem))


def methods_of(kind: str) -> tuple[Method, ...]:
    return tuple(
        Method(name, LIBRARIES.get(name.split()[0], ""), partial(prepare, kind, name), NOTES.get(name, ""))
        for name in TRAINERS
    )


@dataclass
class Curve:
    """Of one method and seed: seconds of training so far and test accuracy, after each part."""

    method: str
    seed: int
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    error: str = ""

    def reaches(self, target: float) -> float:
        """Seconds until the accuracy was first seen to be that high; infinite if it never was."""
        found = (s for s, a in zip(self.seconds, self.accuracies, strict=True) if a >= target)
        return next(found, float("inf"))


def train(methods: Sequence[Method], seed: int, parts: int, rounds: int) -> list[Curve]:
    """Train by all methods, in turns of a few rounds each."""
    curves, works = [], []
    for method in methods:
        curves.append(curve := Curve(method.name, seed))
        _, curve.error = guarded(lambda method=method: method.prepare(seed)(2))  # the warm-up, of another copy
        training, error = guarded(method.prepare, seed) if not curve.error else (None, curve.error)
        curve.error = error
        works.append(training)
    with uncollected():
        for _ in range(parts):
            for curve, training in zip(curves, works, strict=True):
                if curve.error:
                    continue
                taken, curve.error = guarded(timed, training, rounds)
                if not curve.error:
                    curve.seconds.append((curve.seconds[-1] if curve.seconds else 0.0) + taken * rounds)
                    curve.accuracies.append(training.accuracy())
    return curves


def reach(curves: Sequence[Curve], target: float) -> str:
    """Median and range over seeds of the seconds to a target; a seed that never gets there counts as infinity."""
    times = [curve.reaches(target) for curve in curves]
    reached = [t for t in times if t < float("inf")]
    if len(reached) == len(times):
        return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
    middle = statistics.median(times)
    shown = f"{middle:.2f}" if middle < float("inf") else "not reached"
    return f"{shown} ({len(reached)} of {len(times)})"


def run(methods: Sequence[Method], quick: bool, *, kind: str) -> Result:
    seeds, parts, rounds = (2, 2, 5) if quick else (5, 40, 30)
    curves = [curve for seed in range(seeds) for curve in train(methods, seed, parts, rounds)]
    notes = Notes()
    columns = [f"s to {100 * target:.0f} %" for target in TARGETS]
    lines = [f"| | {' | '.join(columns)} | s in all | accuracy at the end |", "|---" * (len(columns) + 3) + "|"]
    series, bands = {}, {}
    for method in methods:
        own = [curve for curve in curves if curve.method == method.name]
        name = f"{method.name} {notes.mark(f'{method.name}: {method.note}')}" if method.note else method.name
        errors = [curve.error for curve in own if curve.error]
        if errors:
            lines.append(
                f"| {name} | error {notes.mark(f'{method.name}: `{errors[0]}`')} |" + " |" * (len(columns) + 1)
            )
            continue
        ends = [curve.accuracies[-1] for curve in own]
        cells = [reach(own, target) for target in TARGETS]
        cells.append(f"{statistics.median(curve.seconds[-1] for curve in own):.2f}")
        cells.append(f"{statistics.median(ends):.3f} ({min(ends):.3f} to {max(ends):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        places = [statistics.median(values) for values in zip(*(curve.seconds for curve in own), strict=True)]
        by_part = list(zip(*(curve.accuracies for curve in own), strict=True))
        series[method.name] = list(zip(places, map(statistics.median, by_part), strict=True))
        bands[method.name] = [(min(values), max(values)) for values in by_part]
    text = (
        f"Seconds of training until the test accuracy was first so high, median and range over {seeds} seeds (where "
        f"some never got there, how many did); {parts * rounds} rounds of one step of either level; "
        f"accuracy looked at every {rounds} rounds."
    )
    return Result(
        "\n".join([text, "", *lines, "", *notes.lines()]),
        [asdict(curve) for curve in curves],
        {kind: line_chart(series, "seconds of training", "test accuracy", bands=bands)},
    )


BENCHMARKS = (
    Benchmark(
        "cleaning",
        "Hyper-cleaning: one weight for each training image",
        partial(run, kind="cleaning"),
        methods_of("cleaning"),
    ),
    Benchmark(
        "reweighting",
        "Reweighting: a net that weights images by their loss",
        partial(run, kind="reweighting"),
        methods_of("reweighting"),
    ),
)
