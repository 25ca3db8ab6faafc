"""`Unroll` against TorchOpt's differentiable optimizers, on two levels of tanh networks."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torchopt
from torch.nn.functional import mse_loss

import mlo

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, torchopt.MetaSGD, {"lr": 0.3, "weight_decay": 0.02}),
    "momentum": (torch.optim.SGD, torchopt.MetaSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}),
    "nesterov": (torch.optim.SGD, torchopt.MetaSGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": (torch.optim.Adam, torchopt.MetaAdam, {"lr": 0.05, "weight_decay": 0.03, "eps": 1e-4}),
    "adamw": (torch.optim.AdamW, torchopt.MetaAdamW, {"lr": 0.05, "weight_decay": 0.2, "eps": 1e-4}),
}


@pytest.fixture(autouse=True)
def _double_precision():
    """TorchOpt computes Adam's bias correction in the default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)


def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def batches(num):
    return [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(num)]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_unroll_agrees_with_torchopt(kind, steps):
    make, make_differentiable, options = OPTIMIZERS[kind]
    torch.manual_seed(steps)
    lower, upper, fitted, scored = network(), network(), batches(3), batches(1)

    def fit(levels, batch):
        return mse_loss(levels.lower(batch[0] + levels.upper(batch[0])), batch[1])

    def score(levels, batch):
        return mse_loss(levels.lower(batch[0]), batch[1]) + 0.1 * levels.upper(batch[0]).square().mean()

    expected_lower = copy.deepcopy(lower)
    optimizer = make_differentiable(expected_lower, **options)
    modules = SimpleNamespace(lower=expected_lower, upper=upper)
    for step in range(steps):
        optimizer.step(fit(modules, fitted[step % 3]))
    expected = torch.autograd.grad(score(modules, scored[0]), list(upper.parameters()))

    graph = mlo.Graph(
        [
            mlo.Problem("lower", lower, fit, make(lower.parameters(), **options), fitted,
                        hypergradient=mlo.Unroll(), steps=steps),
            mlo.Problem("upper", upper, score, torch.optim.SGD(upper.parameters()), scored),
        ],
        [mlo.Edge("upper", "lower"), mlo.Edge("lower", "upper")],
    )  # fmt: skip
    found = mlo.Engine(graph, seed=0, device="cpu").hypergradient("upper").values()
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-9
