"""Losses read levels through views that change nothing, whatever the module is made of."""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mlo
from mlo.levels import Undo


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x):
        return self.cell(x[:, None])[0][:, 0]


class Scales(NamedTuple):
    inner: torch.Tensor
    outer: torch.Tensor


class Scaled(nn.Module):
    """Returns a dictionary with a named tuple."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x, *, factor=1.0):
        y = self.net(x)
        return {"scales": Scales(factor * y, y**2), "name": "scaled", "constant": torch.ones(3)}


def exact_and_different_ways(lower, loss, upper_module=None, *, steps=2):
    """The hypergradients by unrolling and by a fine difference, float64, each compared with the black box too."""
    upper_module = (upper_module or nn.Linear(3, 3)).double()
    lower = lower.double()
    start = [{k: v.clone() for k, v in m.state_dict().items()} for m in (lower, upper_module)]
    found = []
    for estimator in (mlo.Unroll(), mlo.FiniteDifference(radius=1e-4, last=None)):
        lower.load_state_dict(start[0])
        upper_module.load_state_dict(start[1])
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(5, 3, generator=generator, dtype=torch.float64),) * 2 for _ in range(3)]
        graph = mlo.Graph(
            [
                mlo.Problem("low", lower, loss, torch.optim.SGD(lower.parameters(), lr=0.1), data, steps=steps,
                            hypergradient=estimator),
                mlo.Problem("up", upper_module, lambda levels, batch: upper_loss(levels, batch, loss),
                            torch.optim.SGD(upper_module.parameters(), lr=0.1), data),
            ],
            [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
        )  # fmt: skip
        engine = mlo.Engine(graph, device="cpu")
        gradient = engine.hypergradient("up")
        found.append(torch.cat([g.reshape(-1) for g in gradient.values()]))
        (checked,) = engine.check("up", directions=4, progress=False).levels
        assert checked.error < 1e-5
    return found


def upper_loss(levels, batch, loss):
    return loss(levels, batch) * 0.5 + levels.low(batch[0]).square().sum()


def plain(levels, batch):
    return (levels.low(batch[0]) - levels.up(batch[1])).square().mean()


@pytest.mark.parametrize(
    "lower",
    [
        Tied,
        Recurrent,
        lambda: parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Softplus()),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.4)),
    ],
    ids=["tied", "lstm", "parametrized", "dropout"],
)
def test_modules_of_all_kinds(lower):
    exact, near = exact_and_different_ways(lower(), plain)
    assert exact.norm() > 0
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


def writes(levels, batch):
    """A loss that writes into what other levels return."""
    target = levels.up(batch[1])
    target.mul_(2).add_(1)
    return (levels.low(batch[0]) - target).square().mean()


def reads_attributes(levels, batch):
    weight = levels.up.weight
    return (levels.low(batch[0]) - batch[1] @ weight.t() * levels.up.bias.exp()).square().mean()


def branches(levels, batch):
    scale = levels.up(batch[1])
    loss = (levels.low(batch[0]) - scale).square()
    return loss.mean() if float(loss.detach().sum()) > 1e9 else loss.sum(1).sort().values[1:].mean()


def calls_twice(levels, batch):
    """Two calls with the same arguments draw different noise."""
    noisy = [levels.up(batch[1]) * torch.rand(3, dtype=torch.float64) for _ in range(2)]
    return (levels.low(batch[0]) - noisy[0]).square().mean() + (levels.low(batch[0]) + noisy[1]).square().mean()


def mixes(levels, batch):
    """Another level's module applied to this level's output: the call cannot be kept."""
    return (levels.up(levels.low(batch[0])) - batch[1]).square().mean() + levels.up(batch[0]).square().mean()


@pytest.mark.parametrize("loss", [writes, reads_attributes, branches, calls_twice, mixes])
@pytest.mark.parametrize("steps", [1, 3])
def test_losses_of_all_kinds(loss, steps):
    torch.manual_seed(1)
    exact, near = exact_and_different_ways(nn.Linear(3, 3), loss, steps=steps)
    assert exact.norm() > 0
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


class Noisy(nn.Linear):
    """Draws from the generators that are not torch's, an odd number of normal ones among them."""

    noise = 0.1

    def forward(self, x):
        if self.noise:
            return super().forward(x) * random.random() + self.noise * np.random.normal()
        return super().forward(x)


@pytest.mark.parametrize("start", [0.0, 0.25])
@pytest.mark.parametrize("estimator", [mlo.Unroll(), mlo.FiniteDifference(radius=1e-4, last=None)], ids=repr)
def test_draws_from_python_and_numpy_are_those_of_the_step(estimator, start):
    """Also where a loss begins to draw when calls of the module have been kept without a note of its draws."""
    torch.manual_seed(0)
    low, up = nn.Linear(3, 3).double(), Noisy(3, 3).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def fit(levels, batch):
        if levels.progress < start:
            return (levels.low(batch) - nn.functional.linear(batch, levels.up.weight)).square().mean()
        target = levels.up(batch)
        return ((levels.low(batch) - target) * (random.random() + np.random.normal())).square().mean()

    def judge(levels, batch):
        return levels.low(batch).square().sum() + levels.up.weight.square().sum()

    graph = mlo.Graph(
        [
            mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.1), [x], hypergradient=estimator,
                        steps=2),
            mlo.Problem("up", up, judge, torch.optim.SGD(up.parameters(), lr=0.01), [x]),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    engine = mlo.Engine(graph, seed=2, device="cpu")
    engine.run(1, total_rounds=2, progress=False)
    (level,) = engine.check("up", directions=4, progress=False).levels
    assert level.error < 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_may_read_what_a_hook_left_in_a_module(steps):
    """In a module of torch's own; a kept call would give back the output, but not run the hook again."""

    class Hooked(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 3), nn.Tanh())
            self[0].register_forward_hook(lambda module, args, output: setattr(module, "seen", output))

    def fit(levels, batch):
        target = levels.up(batch[1])
        return (levels.low(batch[0]) - target * levels.up[0].seen.sigmoid()).square().mean()

    torch.manual_seed(1)
    exact, near = exact_and_different_ways(nn.Linear(3, 3), fit, Hooked(), steps=steps)
    assert exact.norm() > 0
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("weighs", "of_use"), [(True, False), (False, True)])
def test_calls_are_kept_as_long_as_they_are_of_use(weighs, of_use):
    """A module whose arguments move with the level's own variables never gets the same call twice in a difference."""
    low, up = nn.Linear(3, 3), nn.Linear(3, 3)

    def fit(levels, batch):
        found = levels.low(batch)
        return (found * levels.up(found.detach() if weighs else batch)).square().mean()

    graph = mlo.Graph(
        [
            mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.1), [torch.ones(5, 3)]),
            mlo.Problem("up", up, lambda levels, batch: levels.low(batch).square().sum(),
                        torch.optim.SGD(up.parameters(), lr=0.1), [torch.ones(5, 3)]),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    engine = mlo.Engine(graph, device="cpu")
    engine.run(5, progress=False)
    assert engine._levels["low"].habits.keeps("up") == of_use


@pytest.mark.parametrize(
    "estimator",
    [mlo.FiniteDifference(last=None), mlo.SAMA(), mlo.Penalty(steps=20), mlo.Unroll(), mlo.ConjugateGradient()],
    ids=repr,
)
def test_a_loss_may_differentiate_itself(estimator):
    """A penalty on its gradient gives the hypergradient of the same penalty written out."""

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 1, bias=False)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x) * (1 + 0.1 * self.calls)

    def engine(gradient):
        torch.manual_seed(0)
        low, up = Counting().double(), nn.Linear(3, 1).double()
        x = torch.randn(5, 3, dtype=torch.float64)

        def fit(levels, batch):
            error = levels.low(batch) - levels.up(batch)
            loss = error.square().mean()
            scaled_error = (1 + 0.1 * levels.low.calls) * error
            return loss + 0.01 * gradient(loss, levels.low.weight, scaled_error, batch).pow(4).sum()

        def judge(levels, batch):
            return levels.low(batch).square().mean()

        graph = mlo.Graph(
            [
                mlo.Problem("low", low, fit, torch.optim.SGD(low.parameters(), lr=0.02), [x], hypergradient=estimator,
                            steps=3),
                mlo.Problem("up", up, judge, torch.optim.SGD(up.parameters(), lr=0.1), [x]),
            ],
            [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
        )  # fmt: skip
        return mlo.Engine(graph, device="cpu")

    itself = engine(lambda loss, weight, *_: torch.autograd.grad(loss, weight, create_graph=True)[0])
    found = itself.hypergradient("up")
    assert all(map(torch.equal, found.values(), itself.hypergradient("up").values()))
    expected = engine(lambda loss, weight, error, x: 2 * error.T @ x / len(x)).hypergradient("up")
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    assert found["weight"].abs().max() > 1e-3


def test_structured_outputs_and_keywords():
    def loss(levels, batch):
        out = levels.up(batch[1], factor=0.5)
        assert out["name"] == "scaled"
        target = out["scales"].inner + out["scales"].outer * out["constant"]
        return (levels.low(batch[0]) - target).square().mean()

    exact, near = exact_and_different_ways(nn.Linear(3, 3), loss, Scaled(), steps=1)
    assert exact.norm() > 0
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


def test_dropout_in_a_level_that_is_read_has_one_mask_in_both_sides_of_a_difference():
    exact, near = exact_and_different_ways(
        nn.Linear(3, 3), plain, nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)), steps=1
    )
    torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-8)


def test_a_loss_that_raises_leaves_the_module_as_it_was():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = nn.Linear(2, 2)
    parameters = list(module.parameters())

    def fail(levels, batch):
        levels.low(batch)
        if fail.armed:
            raise KeyError("mine")
        return levels.low(batch).sum() + levels.up(batch).sum()

    fail.armed = False
    graph = mlo.Graph(
        [
            mlo.Problem("low", module, lambda levels, batch: (levels.low(batch) ** 2).mean() * levels.up(batch).mean(),
                        torch.optim.SGD(module.parameters(), lr=0.1), [torch.randn(4, 2)]),
            mlo.Problem("up", other, fail, torch.optim.SGD(other.parameters(), lr=0.1), [torch.randn(4, 2)]),
        ],
        [mlo.Edge("up", "low"), mlo.Edge("low", "up")],
    )  # fmt: skip
    engine = mlo.Engine(graph, device="cpu")
    engine.run(1, progress=False)
    before = module[1].running_mean.clone(), torch.get_rng_state()
    fail.armed = True
    with pytest.raises(KeyError, match="mine"):
        engine.hypergradient("up")
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert module[1].track_running_stats
    assert torch.equal(module[1].running_mean, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    fail.armed = False
    engine.run(1, progress=False)


def test_everything_is_put_back_even_if_that_is_interrupted():
    done = []

    def interrupted():
        raise KeyboardInterrupt

    undo = Undo()
    for function in (lambda: done.append("last"), interrupted, lambda: done.append("first")):
        undo.callback(function)
    with pytest.raises(KeyboardInterrupt), undo:
        pass
    assert done == ["first", "last"]
