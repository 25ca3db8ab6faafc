from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from problems.search_spaces import Architecture, SearchSpace, Supernet
from problems.search_spaces.cells import MixedOperation
from problems.search_spaces.pc_darts import PartialOperation, shuffle_channels

SPACE = SearchSpace.uniform(("none", "skip_connect", "sep_conv_3x3"), num_nodes=2)


def num_weights(module):
    return sum(p.numel() for p in module.parameters())


def test_number_of_weights():
    assert num_weights(Supernet(10, 16, 8, operation=PartialOperation)) == 299_578
    imagenet = Supernet(1000, 16, 8, operation=partial(PartialOperation, k=2), stem="imagenet")
    assert num_weights(imagenet) == 956_512


def test_shuffling_takes_one_channel_of_each_group_in_turn():
    x = torch.arange(12.0).reshape(1, 12, 1, 1)
    assert shuffle_channels(x, 4).flatten().tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(shuffle_channels(x, 4), nn.ChannelShuffle(4)(x))


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_channels_are_operated_on_and_the_others_pass(stride, size):
    torch.manual_seed(0)
    edge = PartialOperation(("none", "skip_connect", "sep_conv_3x3"), 8, stride)
    x, weights = torch.randn(3, 8, *size), torch.tensor([0.2, 0.5, 0.3])
    ours = shuffle_channels(edge(x, weights), 2)  # 2 channels a group of 4: undoes the shuffle
    expected = 0.5 * edge.operations["skip_connect"](x[:, :2]) + 0.3 * edge.operations["sep_conv_3x3"](x[:, :2])
    assert torch.allclose(ours[:, :2], expected, atol=1e-6)
    passing = x[:, 2:] if stride == 1 else functional.max_pool2d(x[:, 2:], 2, ceil_mode=True)
    assert torch.equal(ours[:, 2:], passing)


def test_channels_that_are_no_multiple_are_refused():
    with pytest.raises(ValueError, match="expected channels that are a multiple of k = 4, got 6"):
        PartialOperation(("skip_connect",), 6, 1)


def test_edges_are_normalized_within_a_node():
    architecture = Architecture(SPACE, edge_normalization=True)
    assert {name for name, _ in architecture.named_parameters()} == {"normal", "reduce", "normal_beta", "reduce_beta"}
    weights = architecture()
    assert weights.normal_edges.shape == (5,)
    assert weights.normal_edges[:2].sum().item() == pytest.approx(1.0)
    assert weights.normal_edges[2:].sum().item() == pytest.approx(1.0)


def test_edge_weights_scale_whole_edges():
    torch.manual_seed(0)
    supernet, architecture = Supernet(3, 4, 3, 1, space=SPACE, operation=PartialOperation), Architecture(SPACE)
    cell, x = supernet.cells[0], torch.randn(2, 12, 4, 4)
    weights = architecture().normal
    cell.eval()
    edges = torch.tensor([0.25, 0.75, 0.5, 0.3, 0.2])
    first = cell(x, x, weights, edges)[:, :4]
    inputs = cell.preprocess(x, x)
    expected = 0.25 * cell.edges[0](inputs[0], weights[0]) + 0.75 * cell.edges[1](inputs[1], weights[1])
    assert torch.allclose(first, expected, atol=1e-6)


def test_discretization_ranks_alpha_times_beta():
    """Alpha alone would keep the edges from 0 and 1."""
    architecture = Architecture(SPACE, edge_normalization=True)
    with torch.no_grad():
        architecture.normal.zero_()
        architecture.normal[2:4, 2] = 2.0
        architecture.normal[4, 1] = 1.0
        architecture.normal_beta.copy_(torch.tensor([0.0, 0.0, 0.0, -5.0, 3.0]))
    assert architecture.discretize().normal[2:] == (("skip_connect", 2), ("sep_conv_3x3", 0))


def test_second_derivatives_reach_beta():
    torch.manual_seed(0)
    supernet = Supernet(3, 4, 3, 1, space=SPACE, operation=PartialOperation).double()
    architecture = Architecture(SPACE, edge_normalization=True).double()
    loss = supernet(torch.randn(4, 1, 8, 8).double(), architecture()).square().mean()
    weight = supernet.cells[0].edges[0].operations["sep_conv_3x3"][1].weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (mixed,) = torch.autograd.grad(gradient.square().sum(), architecture.normal_beta)
    assert mixed.abs().sum() > 0


def test_all_channels_may_be_operated_on():
    torch.manual_seed(0)
    plain, partial_ = MixedOperation(SPACE.normal[0], 4, 2), PartialOperation(SPACE.normal[0], 4, 2, k=1)
    partial_.load_state_dict(plain.state_dict())
    x, weights = torch.randn(2, 4, 6, 6), torch.rand(len(SPACE.normal[0]))
    assert torch.equal(partial_(x, weights), plain(x, weights))
