"""Calls of other levels' modules that are kept: given back only where they are the same ones, and to no one else."""

import collections
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.calls import Calls

from .quadratics import relative_error
from .random_graphs import flat
from .test_kept_graphs import bilevel


def tangents(levels, batch):
    slopes = torch.func.jvp(levels.up, (batch,), (batch.sin(),))[1]
    return (levels.low(batch) - slopes - levels.up(batch)).pow(4).mean()


def duals(levels, batch):
    with forward_ad.dual_level():
        slopes = forward_ad.unpack_dual(levels.up(forward_ad.make_dual(batch, batch.sin()))).tangent
    return (levels.low(batch) - slopes - levels.up(batch)).pow(4).mean()


def jacobian(levels, batch):
    """At the point of a call of the same shape."""
    slopes = torch.func.jacfwd(levels.up)(batch[0])
    return (levels.low(batch) - slopes.sum(0) - levels.up(batch[0])).pow(4).mean()


def mapped(levels, batch):
    return (levels.low(batch) - torch.func.vmap(levels.up)(batch) - levels.up(batch[0])).pow(4).mean()


def in_two_modes(levels, batch):
    """Of equal arguments."""
    levels.up.train()
    noisy = levels.up(batch)
    levels.up.eval()
    return (levels.low(batch) - 2 * noisy + levels.up(batch).sin()).pow(4).mean()


def refilled(levels, batch):
    """By a call and another one of the same tensor, written into past PyTorch in between."""
    array = np.zeros((8, 3))
    shared = torch.from_numpy(array)
    array[:] = batch.numpy()
    first = levels.up(shared)
    array[:] = batch.sin().numpy()
    return (levels.low(batch) - 2 * first + levels.up(shared).sin()).pow(4).mean()


def checkpointed(levels, batch):
    """Twice the same call, of different draws."""
    outputs = [checkpoint(lambda x: levels.up(x).sin(), batch, use_reentrant=False) for _ in range(2)]
    return (levels.low(batch) - outputs[0] * outputs[1].exp()).pow(4).mean()


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)


class Leaving(Linear):
    """Leaves a feature in a list, and its size in a number, all within others."""

    def __init__(self):
        super().__init__()
        self.left = {"features": [], "size": 1.0}

    def forward(self, x):
        y = super().forward(x)
        self.left["features"] = [y.tanh()]
        self.left["size"] = float(y.detach().abs().mean())
        return y


def of_features(levels, batch):
    return (levels.low(batch) - levels.up(batch) * levels.up.left["features"][0]).pow(4).mean()


def of_size(levels, batch):
    return (levels.low(batch) - levels.up(batch) * levels.up.left["size"]).pow(4).mean()


class Gathering(Linear):
    """Gathers losses of its own from call to call."""

    def __init__(self):
        super().__init__()
        self.gathered = {"losses": []}

    def forward(self, x):
        y = super().forward(x)
        self.gathered["losses"].append(y.square().mean())
        return y


def of_gathered(levels, batch):
    labels = levels.up(batch)
    gathered = sum(levels.up.gathered["losses"])
    levels.up.gathered["losses"].clear()
    return (levels.low(batch) - labels).pow(4).mean() * (1 + gathered)


class Noting(Linear):
    """Notes how many there were, and whether they are in a list that stays the same."""

    def __init__(self):
        super().__init__()
        self.num, self.signs = 0, [torch.ones(3, dtype=torch.float64)]

    def forward(self, x):
        self.num = len(x)
        self.signs[0].copy_(x.mean(0).sign())
        return super().forward(x)


def of_noted(levels, batch):
    return (levels.low(batch) - levels.up(batch) * levels.up.num * levels.up.signs[0]).pow(4).mean()


def measuring(levels, batch):
    """Calls the upper level once more, in between."""
    with torch.no_grad():
        levels.up(batch[1:].sin())
    getattr(levels.up, "gathered", {"losses": []})["losses"].clear()
    return (levels.low(batch) - 1).square().mean()


class Sparse(nn.Module):
    """Returns a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], self.values, (3, 3), check_invariants=True)


def of_matrix(levels, batch):
    outputs = levels.low(batch)
    return (outputs - torch.sparse.mm(levels.up(batch), outputs.T).T).pow(4).mean()


class Pair(collections.namedtuple("Pair", "one twice")):
    """Has another constructor than its fields suggest."""

    __slots__ = ()

    def __new__(cls, one):
        return super().__new__(cls, one, 2 * one)


class Pairing(Linear):
    """Returns a pair."""

    def forward(self, x):
        return Pair(super().forward(x))


def of_pair(levels, batch):
    return (levels.low(batch) - levels.up(batch).twice).pow(4).mean()


def in_inference(levels, batch):
    with torch.inference_mode():
        mask = levels.up(levels.up(batch)) > 0
    return (levels.low(batch) * mask.clone() - levels.up(batch)).pow(4).mean()


ESTIMATORS = [mlo.FiniteDifference(1e-5), mlo.FiniteDifference(1e-7, one_sided=True), mlo.Unroll(last=1, graphs=0)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # what forward mode goes by
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    ("loss", "up"),
    [
        (tangents, None),
        (duals, None),
        (jacobian, None),
        (mapped, None),
        (in_two_modes, lambda: nn.Sequential(spectral_norm(nn.Linear(3, 3)), nn.Dropout(0.3))),
        (refilled, None),
        (checkpointed, lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))),
        (of_features, Leaving),
        (of_size, Leaving),
        (of_gathered, Gathering),
        (of_noted, Noting),
        (of_matrix, Sparse),
        (of_pair, Pairing),
        (in_inference, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_call_is_given_back_in_its_own_place_alone(loss, up, estimator):
    """In the place of one that is more, left something behind or was not kept it would be another function."""
    for steps in (1, 2):
        found, expected = (
            flat(bilevel(each, fit=loss, judge=measuring, up=up, steps=steps).hypergradient("up").values())
            for each in (estimator, mlo.Unroll(last=1))
        )
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("estimator", [*ESTIMATORS, mlo.Unroll()], ids=repr)
def test_activations_that_a_loss_recomputes_are_not_kept(estimator):
    """Statistics move twice a step, as in PyTorch, and nothing stays from round to round."""

    def fit(levels, batch):
        return checkpoint(lambda x: (levels.low(x) - levels.up(x)).sin(), batch, use_reentrant=False).pow(4).mean()

    engine = bilevel(estimator, low=lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), fit=fit)
    alive = []
    for _ in range(3):
        engine.run(1, progress=False)
        gc.collect()
        alive.append(sum(type(each) is Calls for each in gc.get_objects()))
    assert alive[2] == alive[1]
    assert int(engine.graph["low"].module[0][1].num_batches_tracked) == 2 * 3


@pytest.mark.filterwarnings("ignore:level 'low', Penalty:RuntimeWarning")
def test_what_a_loss_was_given_is_free_after_it():
    """Written into, it holds all that the loss computed: once an evaluation, that would be many graphs."""
    given, alive = [], []

    def fit(levels, batch):
        alive.append(sum(each() is not None for each in given))
        labels = levels.up(batch)
        given.append(weakref.ref(labels))
        labels += levels.low(batch)
        return labels.square().mean()

    bilevel(mlo.Penalty(steps=20), fit=fit).run(1, progress=False)
    assert len(alive) > 40
    assert max(alive) <= 1
