"""Graphs that Betty can express: quadratic ones with known derivatives, and small networks with everything in them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mlo
from tests.conformance.quadratics import Vector


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed, n=3):
    root = random(seed, n, n)
    return root @ root.T / n + torch.eye(n, dtype=torch.float64)


H1, H2, C1, C2 = positive(1), positive(2), random(3, 3, 3), random(4, 3, 3)
AIM, OTHER_AIM = random(5, 3), random(6, 3)


def vector(seed):
    return Vector(random(seed, 3).tolist())


def sgd(module, lr=0.1):
    return torch.optim.SGD(module.parameters(), lr=lr)


def bilevel(estimator, *, steps=1, optimizer=sgd, **options):
    """L_w = 1/2 w'H1 w + w'C1 a, L_a = 1/2 |w - AIM|^2; the step of a is its gradient."""
    w, a = vector(10), vector(11)

    def lower(levels, batch):
        return levels.w() @ H1 @ levels.w() / 2 + levels.w() @ C1 @ levels.a()

    def upper(levels, batch):
        return (levels.w() - AIM).square().sum() / 2

    return mlo.Graph(
        [
            mlo.Problem("w", w, lower, optimizer(w), None, steps=steps, hypergradient=estimator, **options),
            mlo.Problem("a", a, upper, sgd(a, 1.0), None),
        ],
        [mlo.Edge("a", "w"), mlo.Edge("w", "a")],
    )


def teaching(estimator, *, teacher_steps=1, student_steps=1):
    """LBT's three levels and five edges on quadratics; the step of A is its gradient."""
    t, s, a = vector(20), vector(21), vector(22)

    def teacher(levels, batch):
        return levels.t() @ H1 @ levels.t() / 2 + levels.t() @ C1 @ levels.a()

    def student(levels, batch):
        return levels.s() @ H2 @ levels.s() / 2 + levels.s() @ C2 @ levels.t() + levels.s() @ C1 @ levels.a()

    def architecture(levels, batch):
        return (levels.t() - AIM).square().sum() / 2 + (levels.s() - OTHER_AIM).square().sum() / 2

    return mlo.Graph(
        [
            mlo.Problem("t", t, teacher, sgd(t), None, hypergradient=estimator, steps=teacher_steps),
            mlo.Problem("s", s, student, sgd(s), None, hypergradient=estimator, steps=student_steps),
            mlo.Problem("a", a, architecture, sgd(a, 1.0), None),
        ],
        [
            mlo.Edge("a", "t"),
            mlo.Edge("t", "s"),
            mlo.Edge("a", "s", detached=True),
            mlo.Edge("t", "a"),
            mlo.Edge("s", "a"),
        ],
    )


def nest(estimator, steps=(1, 1, 1)):
    """Three levels that all read each other."""
    modules = [vector(30 + i) for i in range(3)]

    def loss_of(i):
        def loss(levels, batch):
            w = [levels.l0(), levels.l1(), levels.l2()]
            return (w[i] - 0.3 * (w[0] + w[1] + w[2]) - 0.1 * AIM).square().sum() / 2

        return loss

    return mlo.Graph(
        [
            mlo.Problem(f"l{i}", m, loss_of(i), sgd(m), None, hypergradient=estimator, steps=steps[i])
            for i, m in enumerate(modules)
        ],
        [mlo.Edge(f"l{a}", f"l{b}") for a in range(3) for b in range(3) if a != b],
    )


def siblings(steps=(1, 1)):
    """Two levels that read nothing of each other, inside a third."""
    modules = [vector(40 + i) for i in range(3)]

    def lower(name):
        return lambda levels, batch: (getattr(levels, name)() - levels.top()).square().sum() / 2

    def upper(levels, batch):
        return (levels.one() + levels.two() - AIM).square().sum() / 2

    return mlo.Graph(
        [
            mlo.Problem("one", modules[0], lower("one"), sgd(modules[0]), None, steps=steps[0]),
            mlo.Problem("two", modules[1], lower("two"), sgd(modules[1]), None, steps=steps[1]),
            mlo.Problem("top", modules[2], upper, sgd(modules[2]), None),
        ],
        [mlo.Edge("top", n) for n in ("one", "two")] + [mlo.Edge(n, "top") for n in ("one", "two")],
    )


class Noisy(nn.Sequential):
    """A network with dropout, batch normalization, and a frozen layer, in float64."""

    def __init__(self, *, normalized=True):
        norm = nn.BatchNorm1d(5) if normalized else nn.Identity()
        super().__init__(
            nn.Linear(4, 5, bias=False), norm, nn.Softplus(), nn.Dropout(0.3), nn.Linear(5, 5), nn.Linear(5, 2)
        )
        self[4].requires_grad_(False)
        self.double()


def networks(estimator, *, teacher_steps=1, dropout=True, warmup_rounds=0, micro_batches=1, scheduled=True):
    """Teacher, student and weights with shuffled data, momentum, Adam of two groups, AdamW, clipping, schedules."""
    torch.manual_seed(0)
    teacher, student, gate = Noisy(), Noisy(), nn.Linear(1, 2).double()
    if not dropout:
        teacher[3].p = student[3].p = 0.0
    images, labels = random(50, 24, 4), torch.arange(24) % 2
    one = torch.ones(1, 1, dtype=torch.float64)

    def teacher_loss(levels, batch):
        logits = levels.teacher(batch[0]) + levels.gate(one)
        return mlo.Output(F.cross_entropy(logits, batch[1]), {"progress": levels.progress})

    def student_loss(levels, batch):
        return F.cross_entropy(levels.student(batch[0]), levels.teacher(batch[0]).detach().softmax(-1))

    def gate_loss(levels, batch):
        decay = levels.gate.weight.square().sum()
        losses = [F.cross_entropy(level(batch[0]), batch[1]) for level in (levels.teacher, levels.student)]
        return sum(losses) + decay

    def data():
        return DataLoader(TensorDataset(images, labels), batch_size=7, shuffle=True)

    first = torch.optim.SGD(teacher.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    rest = [*student[1].parameters(), *student[5].parameters()]
    second = torch.optim.Adam([{"params": student[0].parameters(), "lr": 0.05}, {"params": rest}])
    third = torch.optim.AdamW(gate.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.9**step) if scheduled else None
    return mlo.Graph(
        [
            mlo.Problem(
                "teacher",
                teacher,
                teacher_loss,
                first,
                data(),
                hypergradient=estimator,
                steps=teacher_steps,
                scheduler=schedule,
                clip_norm=0.5,
                micro_batches=micro_batches,
            ),
            mlo.Problem("student", student, student_loss, second, data(), hypergradient=estimator),
            mlo.Problem("gate", gate, gate_loss, third, data(), warmup_rounds=warmup_rounds),
        ],
        [
            mlo.Edge("gate", "teacher"),
            mlo.Edge("teacher", "student"),
            mlo.Edge("teacher", "gate"),
            mlo.Edge("student", "gate"),
        ],
    )
