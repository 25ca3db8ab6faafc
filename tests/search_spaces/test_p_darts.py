import math

import pytest
import torch

from problems.search_spaces import Architecture, CellWeights, SearchSpace, Supernet, discretize
from problems.search_spaces.cells import EdgeState, MixedOperation
from problems.search_spaces.p_darts import SkipDropout, prune
from problems.search_spaces.stopping import SkipLimit

NAMES = ("none", "skip_connect", "sep_conv_3x3", "max_pool_3x3")
SPACE = SearchSpace.uniform(NAMES, num_nodes=1)


def test_pruning_keeps_the_strongest_of_each_edge_and_cell_in_their_order():
    architecture = Architecture(SPACE)
    with torch.no_grad():
        architecture.normal.copy_(torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]]))
        architecture.reduce.copy_(torch.tensor([[1.0, 2.0, 0.0, 3.0], [9.0, 8.0, 7.0, 6.0]]))
    space = prune(architecture, 2)
    assert space.normal == (("none", "sep_conv_3x3"), ("sep_conv_3x3", "max_pool_3x3"))
    assert space.reduce == (("skip_connect", "max_pool_3x3"), ("none", "skip_connect"))
    logits = Supernet(3, 2, 3, 1, space=space)(torch.randn(2, 1, 8, 8), Architecture(space)())
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("num", [1, 5])
def test_pruning_to_no_choice_is_refused(num):
    with pytest.raises(ValueError, match=f"expected between 2 and 4 primitives to be kept, got {num}"):
        prune(Architecture(SPACE), num)


def test_an_architecture_that_has_diverged_is_not_pruned():
    architecture = Architecture(SPACE)
    with torch.no_grad():
        architecture.normal[0] = float("nan")
    with pytest.raises(ValueError, match="an architecture that has diverged"):
        prune(architecture, 2)


@pytest.mark.parametrize("epochs", [25, 50, 100, 600])
def test_every_epoch_has_its_own_dropout(epochs):
    dropout = SkipDropout(0.3, epochs, frozen_epochs=0)
    for epoch in range(epochs):
        assert dropout(epoch / epochs) == pytest.approx(0.3 * math.exp(-0.2 * epoch))


def test_the_dropout_of_identities_falls_linearly_then_exponentially():
    dropout = SkipDropout(0.4)
    assert dropout(0.0) == pytest.approx(0.4 * 24 / 25)
    assert dropout(9 / 25) == pytest.approx(0.4 * 15 / 25)
    assert dropout(10 / 25) == pytest.approx(0.4)
    assert dropout(24.5 / 25) == pytest.approx(0.4 * math.exp(-0.2 * 14))
    with pytest.raises(ValueError, match="expected 0 <= initial < 1"):
        SkipDropout(1.0)


def test_dropout_is_on_identities_in_training_only():
    torch.manual_seed(0)
    x, weights, state = torch.ones(8, 4, 16, 16), torch.tensor([0.0, 1.0, 0.0, 0.0]), EdgeState(skip_dropout=0.5)
    same, reducing = (MixedOperation(NAMES, 4, stride) for stride in (1, 2))
    dropped = same(x, weights, state)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert 0.45 < (dropped == 0).float().mean() < 0.55
    assert torch.equal(same.eval()(x, weights, state), x)
    assert not (reducing(torch.randn_like(x), weights, state) == 0).any()


def test_at_most_so_many_skip_connections():
    """The weakest one gives way, first to another primitive of its edge, or the node takes another edge."""
    space = SearchSpace.uniform(("skip_connect", "sep_conv_3x3"), num_nodes=2)
    normal = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.45, 0.55]])
    weights = CellWeights(normal, normal)
    assert [name for name, _ in discretize(weights, space).normal] == ["skip_connect"] * 4
    three = discretize(weights, space, max_skips=3)
    assert three.normal == (("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 0), ("sep_conv_3x3", 2))
    two = discretize(weights, space, max_skips=2)
    assert two.normal == (("skip_connect", 0), ("skip_connect", 1), ("sep_conv_3x3", 2), ("sep_conv_3x3", 1))
    none = discretize(weights, space, max_skips=0)
    assert none.normal == (("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 2), ("sep_conv_3x3", 1))
    assert none.reduce == discretize(weights, space).reduce


def test_a_skip_connection_gives_way_to_lower_scores_than_zero():
    space = SearchSpace.uniform(("skip_connect", "sep_conv_3x3"), num_nodes=1)
    for scores in (torch.tensor([[-1.0, -2.0], [-1.0, -3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])):
        found = discretize(CellWeights(scores, scores), space, max_skips=0)
        assert [name for name, _ in found.normal] == ["sep_conv_3x3"] * 2
    with pytest.raises(ValueError, match="expected max_skips >= 0 or None, got -1"):
        discretize(CellWeights(scores, scores), space, max_skips=-1)


def test_a_space_of_skip_connections_only_cannot_do_without():
    space = SearchSpace.uniform(("skip_connect", "none"), num_nodes=1)
    weights = CellWeights(torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected a space with enough primitives for max_skips = 1"):
        discretize(weights, space, max_skips=1)


def test_a_search_stops_at_so_many_skip_connections():
    architecture = Architecture(SPACE)
    with torch.no_grad():
        architecture.normal.zero_()
        architecture.normal[:, 2] = 1.0
    assert not SkipLimit(1)(architecture)
    with torch.no_grad():
        architecture.normal[0, 1] = 2.0
    assert SkipLimit(1)(architecture)
    assert not SkipLimit(2)(architecture)
    with pytest.raises(ValueError, match="expected num_skips >= 1, got 0"):
        SkipLimit(0)
