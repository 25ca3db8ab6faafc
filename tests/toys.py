"""Small problems that several test files use."""

from __future__ import annotations

import signal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mlo


def noisy_images(num: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(num, 1, 6, 6, generator=generator), torch.randint(3, (num,), generator=generator))


def network() -> nn.Module:
    """A network with everything that makes purity hard: batch normalization, dropout, other buffers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Dropout(0.3),
        nn.Flatten(),
        Counting(),
        nn.Linear(64, 3),
    )


class Counting(nn.Module):
    """Moves a buffer in every forward pass, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


class Centred(nn.Module):
    """Takes a running mean of its inputs away, which each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.mean.lerp_(x.mean(0), 0.3)
        return self.net(x - self.mean).tanh()


def three_levels(
    *,
    estimator: mlo.Hypergradient | None = None,
    steps: int = 2,
    seed: int = 0,
    data_seed: int = 0,
    warmup: int = 0,
    **options,
) -> mlo.Engine:
    """Teacher, student and weights on images, with BatchNorm, dropout, shuffling loaders, schedulers and clipping."""
    torch.manual_seed(0)
    teacher, student, gate = network(), network(), nn.Linear(1, 3)
    estimator = estimator or mlo.FiniteDifference()

    def teacher_loss(levels, batch):
        x, y = batch
        logits = levels.teacher(x) + levels.gate(torch.ones(1, 1))
        return mlo.Output(F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()})

    def student_loss(levels, batch):
        x, y = batch
        target = levels.teacher(x).softmax(-1)
        noise = torch.randn(len(x), 1) * 0.1
        return F.cross_entropy(levels.student(x) + noise, target) + F.cross_entropy(levels.student(x), y)

    def gate_loss(levels, batch):
        x, y = batch
        return F.cross_entropy(levels.teacher(x), y) + F.cross_entropy(levels.student(x), y)

    def problem(name, module, loss, optimizer, **more):
        batches = DataLoader(noisy_images(seed=data_seed), batch_size=20, shuffle=True)
        return mlo.Problem(name, module, loss, optimizer, batches, hypergradient=estimator, **more)

    sgd = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    graph = mlo.Graph(
        [
            problem("teacher", teacher, teacher_loss, sgd, steps=steps, clip_norm=0.5,
                    scheduler=torch.optim.lr_scheduler.StepLR(sgd, 3, 0.5)),
            problem("student", student, student_loss, adam,
                    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20)),
            problem("gate", gate, gate_loss, torch.optim.Adam(gate.parameters(), lr=0.05),
                    warmup_rounds=warmup),
        ],
        [mlo.Edge("gate", "teacher"), mlo.Edge("teacher", "student"), mlo.Edge("teacher", "gate"), mlo.Edge("student",
        "gate")],
    )  # fmt: skip
    return mlo.Engine(graph, seed=seed, device="cpu", **options)


def state_of(engine: mlo.Engine) -> dict[str, object]:
    """Everything that training changes, as plain values that compare bit for bit."""
    state: dict[str, object] = {}
    for problem in engine.graph.levels:
        tensors = {**dict(problem.module.named_parameters()), **dict(problem.module.named_buffers())}
        for name, tensor in tensors.items():
            state[f"{problem.name}.{name}"] = tensor.detach().clone()
            state[f"{problem.name}.{name}.grad"] = None if tensor.grad is None else tensor.grad.clone()
        for i, own in problem.optimizer.state_dict()["state"].items():
            state |= {
                f"{problem.name}.optimizer.{i}.{k}": torch.as_tensor(v).clone() for k, v in own.items() if v is not None
            }
        for i, group in enumerate(problem.optimizer.param_groups):
            state[f"{problem.name}.lr.{i}"] = group["lr"]
        if problem.scheduler is not None:
            state[f"{problem.name}.scheduler"] = problem.scheduler.last_epoch
    return state


def assert_same_state(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, f"{key} differs: {value} and {b[key]}"


def assert_resumes(make, folder, *, rounds: int = 4, at: int = 2) -> None:
    """A run that is saved, and loaded by another engine, goes on as if it had not been interrupted."""
    whole, first, second = (make() for _ in range(3))
    whole.run(rounds, progress=False)
    first.run(at, total_rounds=rounds, progress=False)
    first.save(folder / "checkpoint")
    second.load(folder / "checkpoint")
    second.run(rounds - at, progress=False)
    assert_same_state(state_of(whole), state_of(second))


def signal_at_call(module: nn.Module, number: int, what: signal.Signals) -> None:
    """Send this process a signal as soon as a module has been called so often."""
    calls: list[int] = []

    def count(module, args, output):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(what)

    module.register_forward_hook(count)
