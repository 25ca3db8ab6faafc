"""One step of Learning by Teaching, and one of DARTS of second order, on CIFAR-sized images.

The authors' schedule is written out plainly, on a plain supernet: the passes that their published code makes for one
step, with its nested central differences, and the updates. It does not share anything that it could. The plain supernet
computes what the published one of DARTS does, edge by edge, the zeros of `none` among it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mlo
from mlo.interop.betty import betty_engine
from problems.darts import ArchitectureSearch
from problems.lbt import LearningByTeaching
from problems.search_spaces import Architecture, Supernet
from problems.search_spaces.cells import MixedOperation, SearchCell
from problems.search_spaces.fused import FusedCell
from problems.students import StudentResNet

from ..accuracy import Notes
from .memory import available, peak
from .report import Benchmark, Result, ratio_table, raw
from .timing import Measured, Method, Work, measure

SIZES = {
    1: (8, 5, 16, 32),
    2: (8, 5, 64, 32),
    3: (16, 8, 16, 32),
    4: (16, 8, 64, 32),
    5: (8, 5, 16, 16),
    0: (4, 3, 4, 8),
}
"""Channels, cells, batch and side of the images; 0 for a quick look."""
SMALLER = {2: 1, 4: 3}
"""The same networks with fewer images, from which the memory of a large batch is foretold."""
RADIUS = 0.01
CENTRAL, ONE_SIDED = mlo.FiniteDifference(RADIUS), mlo.FiniteDifference(RADIUS, one_sided=True)


class PublishedCell(SearchCell):
    """The cell with the operations of DARTS' published code: every primitive is computed, weighted and added."""

    def forward(
        self, before_last: Tensor, last: Tensor, weights: Tensor, edge_weights: None = None, states: None = None
    ) -> Tensor:
        nodes: list[Tensor] = self.preprocess(before_last, last)
        for incoming in self.incoming:
            nodes.append(sum(self.mixed(self.edges[edge], nodes[source], weights[edge]) for edge, source in incoming))
        return torch.cat(nodes[-len(self.incoming) :], dim=1)

    @staticmethod
    def mixed(edge: MixedOperation, x: Tensor, weights: Tensor) -> Tensor:
        def branch(name: str) -> Tensor:
            return x[:, :, :: edge.stride, :: edge.stride].mul(0.0) if name == "none" else edge.operations[name](x)

        return sum(weight * branch(name) for weight, name in zip(weights, edge.primitives, strict=True))


@dataclass
class Networks:
    """What every method trains, from the same weights and on the same images."""

    teacher: nn.Module
    architecture: Architecture
    student: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, size: int, cell: Callable[..., SearchCell], memory_format: torch.memory_format) -> Networks:
        channels, cells, batch, side = SIZES[size]
        torch.manual_seed(0)
        teacher, student = Supernet(10, channels, cells, cell=cell), StudentResNet(18, 10, width=64 if size else 8)
        batches = tuple((torch.randn(batch, 3, side, side), torch.randint(10, (batch,))) for _ in range(5))
        for network in (teacher, student):
            network.to(memory_format=memory_format)
        return cls(teacher, Architecture(), student, batches)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        settings = {"lr": 0.025, "momentum": 0.9, "weight_decay": 3e-4}
        return {
            "teacher": torch.optim.SGD(self.teacher.parameters(), **settings),
            "student": torch.optim.SGD(self.student.parameters(), **settings),
            "architecture": torch.optim.Adam(
                self.architecture.parameters(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3
            ),
        }

    def graph(self, estimator: mlo.Hypergradient = CENTRAL) -> mlo.Graph:
        lbt, (t, s, u, vt, vs) = LearningByTeaching(), self.batches
        losses = {"teacher": lbt.teacher_loss, "student": lbt.student_loss, "architecture": lbt.architecture_loss}
        data: dict[str, Any] = {"teacher": [t], "student": [(s, u)], "architecture": [(vt, vs)]}
        optimizers = self.optimizers()
        levels = [
            mlo.Problem(n, getattr(self, n), loss, optimizers[n], data[n], hypergradient=estimator)
            for n, loss in losses.items()
        ]
        return mlo.Graph(levels, lbt.edges)

    def darts(self, estimator: mlo.Hypergradient = CENTRAL) -> mlo.Graph:
        search, optimizers = ArchitectureSearch(), self.optimizers()
        levels = [
            mlo.Problem(
                "network",
                self.teacher,
                search.network_loss,
                optimizers["teacher"],
                [self.batches[0]],
                hypergradient=estimator,
            ),
            mlo.Problem(
                "architecture",
                self.architecture,
                search.architecture_loss,
                optimizers["architecture"],
                [self.batches[3]],
            ),
        ]
        return mlo.Graph(levels, search.edges)


@torch.no_grad()
def moved(parameters: Iterable[Tensor], direction: Sequence[Tensor], length: float) -> None:
    torch._foreach_add_(list(parameters), list(direction), alpha=length)


def grads(loss: Tensor, *groups: Iterable[Tensor]) -> list[list[Tensor]]:
    lists = [list(group) for group in groups]
    found = torch.autograd.grad(loss, [t for group in lists for t in group], allow_unused=True)
    flat = iter(torch.zeros_like(t) if g is None else g for g, t in zip(found, sum(lists, []), strict=True))  # noqa: RUF017
    return [[next(flat) for _ in group] for group in lists]


def stepped(optimizer: torch.optim.Optimizer, gradient: Sequence[Tensor]) -> None:
    for p, g in zip(optimizer.param_groups[0]["params"], gradient, strict=True):
        p.grad = g
    optimizer.step()


def radius(direction: Sequence[Tensor]) -> float:
    return RADIUS / float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(direction)))) + 1e-12)


def difference(parameters: Sequence[Tensor], direction: Sequence[Tensor], gradient: Callable[[], Any]) -> list[Tensor]:
    """(g(w + eps d) - g(w - eps d)) / (2 eps)."""
    eps = radius(direction)
    moved(parameters, direction, eps)
    above = gradient()
    moved(parameters, direction, -2 * eps)
    below = gradient()
    moved(parameters, direction, eps)
    return [(a - b) / (2 * eps) for a, b in zip(above, below, strict=True)]


def authors_lbt(n: Networks) -> Work:
    """14 forward and 12 backward passes of the teacher, 7 and 5 of the student."""
    T, S, A = (list(m.parameters()) for m in (n.teacher, n.student, n.architecture))
    (xt, yt), (xs, ys), (xu, _), (xvt, yvt), (xvs, yvs) = n.batches
    optimizers, rate = n.optimizers(), 0.025

    def teacher(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(n.teacher(x, n.architecture()), y)

    def student(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(n.student(x), y)

    def labels() -> Tensor:
        with torch.no_grad():
            return n.teacher(xu, n.architecture()).argmax(dim=1)

    def step() -> None:
        before_t, before_s = [t.detach().clone() for t in T], [t.detach().clone() for t in S]
        moved(T, grads(teacher(xt, yt), T)[0], -rate)  # the virtual T'
        pseudo = labels()
        moved(S, grads(student(xs, ys), S)[0], -rate)  # the virtual S', in two steps
        moved(S, grads(student(xu, pseudo), S)[0], -rate)
        of_t, direct = grads(teacher(xvt, yvt), T, A)
        of_s = grads(student(xvs, yvs), S)[0]

        def taught() -> list[Tensor]:  # the student stands still, the teacher is differentiated
            with torch.no_grad():
                logits = n.student(xu).log_softmax(dim=1)
            soft = n.teacher(xu, n.architecture()).softmax(dim=1)
            return grads(-(soft * logits).sum(dim=1).mean(), T)[0]

        eps = radius(of_s)
        sides = []
        for sign in (1, -1):
            moved(S, of_s, sign * eps)
            sides.append(taught())
            moved(S, of_s, -sign * eps)
        with torch.no_grad():
            for own, saved in ((T, before_t), (S, before_s)):
                torch._foreach_copy_(own, saved)

        def along() -> list[Tensor]:
            return grads(teacher(xt, yt), A)[0]

        terms = [difference(T, direction, along) for direction in (of_t, *sides)]
        hypergradient = [d - rate * (t - rate * (p - m) / (2 * eps)) for d, t, p, m in zip(direct, *terms, strict=True)]
        stepped(optimizers["architecture"], hypergradient)
        stepped(optimizers["architecture"], grads(teacher(xvt, yvt), A)[0])  # their second Adam step
        stepped(optimizers["teacher"], grads(teacher(xt, yt), T)[0])
        pseudo = labels()
        stepped(optimizers["student"], grads(student(xs, ys), S)[0])
        stepped(optimizers["student"], grads(student(xu, pseudo), S)[0])

    return lambda num: [step() for _ in range(num)]


def authors_darts(n: Networks) -> Work:
    """Five forward and five backward passes: T', validation, two for the product, the real step."""
    T, A = list(n.teacher.parameters()), list(n.architecture.parameters())
    (x, y), (xv, yv) = n.batches[0], n.batches[3]
    optimizers, rate = n.optimizers(), 0.025

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(n.teacher(x, n.architecture()), y)

    def step() -> None:
        before = [t.detach().clone() for t in T]
        moved(T, grads(loss(x, y), T)[0], -rate)
        of_t, direct = grads(loss(xv, yv), T, A)
        with torch.no_grad():
            torch._foreach_copy_(T, before)
        product = difference(T, of_t, lambda: grads(loss(x, y), A)[0])
        stepped(optimizers["architecture"], [d - rate * p for d, p in zip(direct, product, strict=True)])
        stepped(optimizers["teacher"], grads(loss(x, y), T)[0])

    return lambda num: [step() for _ in range(num)]


def passes_alone(n: Networks) -> Work:
    """The 10 forward and 8 backward passes that a step cannot do without, and nothing else."""
    T, S, A = (list(m.parameters()) for m in (n.teacher, n.student, n.architecture))
    x, y = n.batches[0]

    def teacher() -> Tensor:
        return functional.cross_entropy(n.teacher(x, n.architecture()), y)

    def student() -> Tensor:
        return functional.cross_entropy(n.student(x), y)

    def step() -> None:
        for wanted in (T, T, T + A, A, A):
            grads(teacher(), wanted)
        for _ in range(3):
            grads(student(), S)
        with torch.no_grad():
            student()
            student()

    return lambda num: [step() for _ in range(num)]


def with_mlo(graph: mlo.Graph) -> Work:
    engine = mlo.Engine(graph, seed=0, device="cpu")
    return lambda num: engine.run(num, progress=False)


def with_betty(graph: mlo.Graph) -> Work:
    def work(num: int) -> None:
        betty_engine(graph, rounds=num, device="cpu").run()

    return work


LAST, FIRST = torch.channels_last, torch.contiguous_format
LBT: dict[str, tuple[str, Any, Any, Callable[[Networks], Work]]] = {
    "authors' schedule, plain supernet": ("", PublishedCell, FIRST, authors_lbt),
    "Betty, plain supernet": ("Betty", PublishedCell, FIRST, lambda n: with_betty(n.graph())),
    "Betty, our supernet": ("Betty", FusedCell, LAST, lambda n: with_betty(n.graph())),
    "mlo, plain supernet": ("mlo", PublishedCell, FIRST, lambda n: with_mlo(n.graph())),
    "mlo": ("mlo", FusedCell, LAST, lambda n: with_mlo(n.graph())),
    "mlo, one-sided": ("mlo", FusedCell, LAST, lambda n: with_mlo(n.graph(ONE_SIDED))),
    "10 forward and 8 backward passes alone": ("", FusedCell, LAST, passes_alone),
}
DARTS: dict[str, tuple[str, Any, Any, Callable[[Networks], Work]]] = {
    "DARTS' schedule, plain supernet": ("", PublishedCell, FIRST, authors_darts),
    "Betty, plain supernet": ("Betty", PublishedCell, FIRST, lambda n: with_betty(n.darts())),
    "Betty, our supernet": ("Betty", FusedCell, LAST, lambda n: with_betty(n.darts())),
    "mlo, plain supernet": ("mlo", PublishedCell, FIRST, lambda n: with_mlo(n.darts())),
    "mlo": ("mlo", FusedCell, LAST, lambda n: with_mlo(n.darts())),
    "mlo, one-sided": ("mlo", FusedCell, LAST, lambda n: with_mlo(n.darts(ONE_SIDED))),
}
PROBLEMS = {"lbt": LBT, "darts": DARTS}


def prepare(problem: str, name: str, size: int) -> Work:
    _, cell, memory_format, make = PROBLEMS[problem][name]
    return make(Networks.of(size, cell, memory_format))


def too_large(method: Method, size: int) -> str:
    """Say that a step will not fit into the memory there is: activations, nearly all of it, grow with the batch."""
    fewer = peak(method, SMALLER[size], 0)[0] if size in SMALLER else None
    if fewer is None:
        return ""
    expected, there = fewer * SIZES[size][2] / SIZES[SMALLER[size]][2] / 1024, available() / 1024
    told = f"left out: {expected:.0f} GiB to be expected, from {fewer / 1024:.1f} with {SIZES[SMALLER[size]][2]} images"
    return f"{told}; {there:.0f} GiB available" if expected > there else ""


def run(problem: str, size: int, methods: Sequence[Method], quick: bool) -> Result:
    size, turns = (0, 3) if quick else (size, 5)
    left = {method.name: told for method in methods if (told := too_large(method, size))}
    fit = [method for method in methods if method.name not in left]
    peaks = {method.name: peak(method, size, 0) for method in fit} if not quick else {}
    found: list[Measured] = measure(fit, (size,), repeats=turns)
    for one in found:
        one.mebibytes, _ = peaks.get(one.method, (None, ""))
    found += [Measured(name, size, error=told) for name, told in left.items()]
    notes = Notes()
    channels, cells, batch, side = SIZES[size]
    text = (
        f"{channels} channels, {cells} cells, batches of {batch} images of {side} x {side}. Milliseconds a step, the "
        f"median and range of {turns} turns, and how many times that of mlo."
    )
    lines = [text, "", *ratio_table(methods, found, size, "mlo", notes), ""]
    shown = [
        f"{name} - {notes.mark(f'{name}, memory: {error}')}" if mebibytes is None else f"{name} {mebibytes:.0f}"
        for name, (mebibytes, error) in peaks.items()
        if mebibytes is not None or error
    ]
    lines += [f"Peak memory of a step in MiB, beside the networks: {', '.join(shown)}.", ""] if shown else []
    return Result("\n".join([*lines, *notes.lines()]), {"measured": raw(found)})


def methods(problem: str) -> tuple[Method, ...]:
    return tuple(Method(name, way[0], partial(prepare, problem, name)) for name, way in PROBLEMS[problem].items())


BENCHMARKS = (
    Benchmark("lbt", "A step of Learning by Teaching", partial(run, "lbt", 1), methods("lbt")),
    Benchmark("lbt-batch", "The same with a larger batch", partial(run, "lbt", 2), methods("lbt")),
    Benchmark("lbt-supernet", "The same with a larger supernet", partial(run, "lbt", 3), methods("lbt")),
    Benchmark("lbt-both", "The same with a larger batch and supernet", partial(run, "lbt", 4), methods("lbt")),
    Benchmark("darts", "A step of DARTS of second order", partial(run, "darts", 1), methods("darts")),
)
