"""What `torch.compile` gains on passes of first order, and how long the compilation takes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional

import mlo
from problems.students import StudentResNet

from ..accuracy import Notes
from .report import Benchmark, Result, ratio_table, raw
from .timing import Method, Work, measure

PLAIN, COMPILED = "mlo", "mlo, compiled"
SIZES = {0: (0, 4, 8), 1: (18, 16, 32)}
"""Depth of the network, 0 for a single convolution; images a batch; pixels a side."""
first_rounds: dict[str, float] = {}
"""Seconds, by method."""


class Weights(nn.Module):
    """The weight of each class, of the upper level."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return 2 * self.logits.sigmoid()[labels]


def engine(size: int, *, compiled: bool) -> mlo.Engine:
    """Two levels: a network whose classes the upper level weights; all passes are of first order."""
    depth, batch, side = SIZES[size]
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = StudentResNet(depth, 10, 3, small_images=True) if depth else small
    weights = Weights()
    data = [(torch.randn(batch, 3, side, side), torch.randint(10, (batch,))) for _ in range(4)]

    def fit(levels: mlo.Levels, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        losses = functional.cross_entropy(levels.network(images), labels, reduction="none")
        return (levels.weights(labels) * losses).mean()

    def judge(levels: mlo.Levels, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return functional.cross_entropy(levels.network(images), labels)

    sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    adam = torch.optim.Adam(weights.parameters(), lr=0.01)
    problems = [mlo.Problem("network", network, fit, sgd, data), mlo.Problem("weights", weights, judge, adam, data)]
    edges = [mlo.Edge("weights", "network"), mlo.Edge("network", "weights")]
    return mlo.Engine(mlo.Graph(problems, edges), device="cpu", compile=["network"] if compiled else False)


def prepare(name: str, size: int) -> Work:
    made = engine(size, compiled=name == COMPILED)
    torch.compiler.reset()
    with TemporaryDirectory() as empty, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": empty}):
        start = time.perf_counter()
        made.run(1, progress=False)
        first_rounds[name] = time.perf_counter() - start
    return partial(made.run, progress=False)


METHODS = tuple(Method(name, "mlo", partial(prepare, name)) for name in (PLAIN, COMPILED))


def run(methods: Sequence[Method], quick: bool) -> Result:
    size, turns = (0, 3) if quick else (1, 7)
    found = measure(methods, (size,), repeats=turns)
    depth, batch, side = SIZES[size]
    notes = Notes()
    network = f"a ResNet-{depth}" if depth else "a convolution"
    text = (
        f"A round of two levels, {network} and the weights of its classes, differentiated by FiniteDifference(), so "
        f"that all passes are of first order; batches of {batch} images of {side} x {side}. Milliseconds a round, the "
        f"median and range of {turns} turns."
    )
    first = [f"{method.name} {first_rounds.get(method.name, float('nan')):.1f}" for method in methods]
    lines = [text, "", *ratio_table(methods, found, size, PLAIN, notes), ""]
    lines += [f"Seconds of the first round, the compilation included: {', '.join(first)}.", ""]
    return Result("\n".join([*lines, *notes.lines()]), {"measured": raw(found), "first rounds": dict(first_rounds)})


BENCHMARK = Benchmark("compile", "What compilation gains", run, METHODS)
