"""Everything that a real problem has, at once, against steps really taken again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlo
from tests.toys import assert_resumes, assert_same_state, state_of


class Block(nn.Module):
    """A residual network with batch normalization, dropout, drop-path, a frozen and an unused parameter, a buffer."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        h = F.dropout(self.norm(self.stem(x)), 0.2, self.training) * self.frozen
        if torch.rand(()) < 0.7:  # drop-path
            h = h + self.inner(h).tanh() / 0.7
        return self.head(h) * (1 + 0.01 * self.seen)


def engine(estimator, *, shuffle=False, **options):
    torch.manual_seed(0)
    images = torch.utils.data.TensorDataset(torch.randn(24, 4).double(), torch.randint(3, (24,)))
    shared = torch.utils.data.DataLoader(images, batch_size=4, shuffle=shuffle)
    teacher, student, rates = Block().double(), Block().double(), nn.ParameterList([torch.zeros(3).double()])
    teacher_sgd = torch.optim.SGD(
        [
            {"params": [*teacher.stem.parameters(), teacher.frozen], "lr": 0.05},
            {"params": [*teacher.head.parameters(), *teacher.norm.parameters(), teacher.unused], "momentum": 0.9},
        ],  # teacher.inner is in no group
        lr=0.2,
        weight_decay=0.01,
    )

    def teach(levels, batch):
        x, y = batch
        logits = levels.teacher(x)
        weights = levels.rates[0].softmax(0)[y]
        if bool((y == 0).any()) and levels.progress < 0.5:
            weights = weights * (1 + levels.rates[0][0].square())
        loss = logits.new_zeros(())
        for i in range(int(y.max()) + 1):
            loss = loss + (F.cross_entropy(logits, y, reduction="none") * weights)[y == i].sum() / len(y)
        return mlo.Output(loss, {"accuracy": (logits.argmax(1) == y).double().mean()})

    def study(levels, batch):
        x, y = batch
        return F.cross_entropy(levels.student(x), levels.teacher(x).softmax(-1)) + F.cross_entropy(levels.student(x), y)

    def judge(levels, batch):
        x, y = batch
        return F.cross_entropy(levels.student(x), y) + F.cross_entropy(levels.teacher(x), y)

    problems = [
        mlo.Problem("teacher", teacher, teach, teacher_sgd, shared, hypergradient=estimator, steps=3, clip_norm=0.5),
        mlo.Problem("student", student, study, torch.optim.AdamW(student.parameters(), lr=0.02), shared,
                    hypergradient=estimator, steps=2, micro_batches=2,
                    hyperparameters={"lr": lambda levels: 0.02 * levels.rates[0][1].exp()}),
        mlo.Problem("rates", rates, judge, torch.optim.Adam(rates.parameters(), lr=0.1), shared),
    ]  # fmt: skip
    edges = [("rates", "teacher"), ("rates", "student"), ("teacher", "student"), ("teacher", "rates"),
             ("student", "rates")]  # fmt: skip
    return mlo.Engine(mlo.Graph(problems, [mlo.Edge(*e) for e in edges]), seed=0, device="cpu", **options)


@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_black_box_agrees(checkpoint, rollback):
    tried = engine(mlo.Unroll(checkpoint=checkpoint), rollback=rollback)
    for _ in range(2):
        before = state_of(tried)
        found = tried.check(directions=3, progress=False)
        assert found.levels[0].verdict == "exact", found
        assert found.levels[0].error < 1e-6
        assert_same_state(before, state_of(tried))
        tried.run(1, total_rounds=4, progress=False)


def test_a_run_resumes_bit_for_bit(tmp_path):
    assert_resumes(lambda: engine(mlo.Unroll(checkpoint=True), shuffle=True, diagnostics_every=2), tmp_path)
