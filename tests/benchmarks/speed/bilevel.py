"""Two levels that all libraries can be given: a classifier whose training examples are weighted by an upper level.

The lower level minimizes the weighted loss on training batches by SGD with momentum, the upper level the loss of the
classifier on held-out batches by Adam. The losses call modules alone, so that each library can pass its own view of
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mlo

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs (n, d), labels (n,), and the places of the examples in the training set (n,)."""


class WeightNet(nn.Module):
    """An example's weight as a function of its loss (Shu et al. 2019, Meta-Weight-Net)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())

    def forward(self, places: Tensor, losses: Tensor) -> Tensor:
        return self.net(losses[:, None])[:, 0]


class ExampleWeights(nn.Module):
    """One weight for each training example (hyper-cleaning, Franceschi et al. 2017)."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num))

    def forward(self, places: Tensor, losses: Tensor) -> Tensor:
        return self.logits[places].sigmoid()


def fit(lower: Callable[..., Tensor], upper: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The lower level's loss."""
    inputs, labels, places = batch
    losses = cross_entropy(lower(inputs), labels, reduction="none")
    return (upper(places, losses.detach()) * losses).mean()


def judge(lower: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The upper level's loss."""
    inputs, labels, _ = batch
    return cross_entropy(lower(inputs), labels)


@dataclass
class Bilevel:
    """The problem, before a library gets it.

    Attributes:
        lower: the classifier.
        upper: called with places and losses, returns weights.
        training: batches of the lower level, in the order in which they are used, over and over.
        held_out: those of the upper level.
        steps: of the lower level for one of the upper.
        rate: of SGD.
        momentum: of SGD.
        upper_rate: of Adam.
    """

    lower: nn.Module
    upper: nn.Module
    training: Sequence[Batch]
    held_out: Sequence[Batch]
    steps: int = 1
    rate: float = 0.05
    momentum: float = 0.9
    upper_rate: float = 1e-3
    next_training: Iterator[Batch] = field(init=False)
    next_held_out: Iterator[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.next_training = itertools.cycle(self.training)
        self.next_held_out = itertools.cycle(self.held_out)

    @property
    def variables(self) -> list[Tensor]:
        """Of both levels, as they are now (a library may have put others into the modules)."""
        lowers = [getattr(m, key) for m in self.lower.modules() for key in m._parameters]
        return [t.detach().clone() for t in (*lowers, *self.upper.parameters())]

    def sgd(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.lower.parameters(), lr=self.rate, momentum=self.momentum)

    def adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.upper.parameters(), lr=self.upper_rate)

    def engine(self, estimator: mlo.Hypergradient) -> mlo.Engine:
        def lower_loss(levels: Any, batch: Batch) -> Tensor:
            return fit(levels.lower, levels.upper, batch)

        def upper_loss(levels: Any, batch: Batch) -> Tensor:
            return judge(levels.lower, batch)

        levels = [
            mlo.Problem(
                "lower", self.lower, lower_loss, self.sgd(), self.training, hypergradient=estimator, steps=self.steps
            ),
            mlo.Problem("upper", self.upper, upper_loss, self.adam(), self.held_out),
        ]
        edges = [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")]
        return mlo.Engine(mlo.Graph(levels, edges), seed=0, device="cpu")


def perceptron(*widths: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def made_up(steps: int, *, hidden: int = 64, dtype: torch.dtype = torch.float32) -> Bilevel:
    """A classifier 20-hidden-hidden-10 of noisy labels, batches of 64, and a small net that weights the examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lower, upper = perceptron(20, hidden, hidden, 10), WeightNet()
        inputs = torch.randn(64 * 32, 20)
        labels = (inputs @ torch.randn(20, 10) + torch.randn(64 * 32, 10)).argmax(1)
    places = torch.arange(len(inputs))
    batches = list(zip(inputs.to(dtype).split(64), labels.split(64), places.split(64), strict=True))
    return Bilevel(lower.to(dtype), upper.to(dtype), batches[:24], batches[24:], steps)
