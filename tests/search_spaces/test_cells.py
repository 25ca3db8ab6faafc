from itertools import pairwise

import pytest
import torch
from torch import nn

from problems.search_spaces.cells import (
    CellShape,
    EvaluationCell,
    MixedOperation,
    SearchCell,
    cell_shapes,
    drop_path,
    incoming_edges,
)
from problems.search_spaces.darts import DARTS_PRIMITIVES
from problems.search_spaces.primitives import FactorizedReduce

NORMAL = CellShape((6, 6), 4, is_reduction=False, follows_reduction=False)
REDUCTION = CellShape((6, 6), 4, is_reduction=True, follows_reduction=False)
AFTER_REDUCTION = CellShape((6, 6), 4, is_reduction=False, follows_reduction=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("num_cells", "reductions"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (5, [1, 3]), (8, [2, 5]), (20, [6, 13])]
)
def test_cells_at_one_and_two_thirds_reduce_and_double_the_channels(num_cells, reductions):
    shapes, out_channels = cell_shapes(
        (9, 12), 3, num_cells, num_normal_outputs=4, num_reduce_outputs=2, stem_reduces=True
    )
    assert [index for index, shape in enumerate(shapes) if shape.is_reduction] == reductions
    assert shapes[0].in_channels == (9, 12)
    assert shapes[0].follows_reduction
    assert shapes[-1].channels == 3 * 2 ** len(reductions)
    assert out_channels == shapes[-1].channels * (2 if shapes[-1].is_reduction else 4)
    for before, after in pairwise(shapes):
        assert after.in_channels == (before.in_channels[1], before.channels * (2 if before.is_reduction else 4))
        assert after.follows_reduction == before.is_reduction


@pytest.mark.parametrize(("channels", "num_cells"), [(0, 8), (16, 0)])
def test_networks_without_channels_or_cells_are_refused(channels, num_cells):
    with pytest.raises(ValueError, match="expected channels >= 1 and num_cells >= 1"):
        cell_shapes((3, 3), channels, num_cells, num_normal_outputs=4, num_reduce_outputs=4, stem_reduces=False)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixed_operation_is_the_weighted_sum_of_its_primitives(stride):
    mixed = MixedOperation(DARTS_PRIMITIVES, 4, stride)
    x = torch.randn(3, 4, 6, 6)
    weights = torch.rand(8)
    expected = sum(weights[DARTS_PRIMITIVES.index(name)] * op(x) for name, op in mixed.operations.items())
    assert torch.allclose(mixed(x, weights), expected, atol=1e-6)
    assert list(mixed.operations) == list(DARTS_PRIMITIVES[1:])


def test_the_weight_of_none_changes_nothing_and_has_no_gradient():
    mixed = MixedOperation(("none", "skip_connect"), 4, 1)
    weights = torch.tensor([5.0, 2.0], requires_grad=True)
    x = torch.randn(2, 4, 3, 3)
    out = mixed(x, weights)
    assert torch.equal(out, 2 * x)
    (gradient,) = torch.autograd.grad(out.sum(), weights)
    assert gradient[0] == 0
    assert torch.allclose(gradient[1], x.sum())


def test_pools_are_normalized_in_mixed_operations_and_no_batchnorm_is_affine():
    mixed = MixedOperation(DARTS_PRIMITIVES, 4, 2)
    for name in ("max_pool_3x3", "avg_pool_3x3"):
        assert isinstance(mixed.operations[name][-1], nn.BatchNorm2d)
    assert not any(module.affine for module in mixed.modules() if isinstance(module, nn.BatchNorm2d))


def test_incoming_edges_are_ordered_by_node_and_source():
    assert incoming_edges(9)[2] == [(5, 0), (6, 1), (7, 2), (8, 3)]
    assert sum(map(len, incoming_edges(14))) == 14


@pytest.mark.parametrize("num_edges", [0, 1, 3, 13])
def test_a_number_of_edges_that_makes_no_cell_is_refused(num_edges):
    with pytest.raises(ValueError, match=f"got {num_edges}"):
        incoming_edges(num_edges)


def test_a_search_cell_adds_up_its_edges_and_concatenates_its_nodes():
    cell = SearchCell(NORMAL, (("skip_connect", "none"),) * 5)
    before_last, last = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    weights = torch.arange(1.0, 11.0).reshape(5, 2)
    s0, s1 = cell.preprocess(before_last, last)
    s2 = 1 * s0 + 3 * s1
    s3 = 5 * s0 + 7 * s1 + 9 * s2
    assert torch.allclose(cell(before_last, last, weights), torch.cat((s2, s3), 1), atol=1e-5)


def test_a_reduction_cell_strides_on_its_inputs_only():
    cell = SearchCell(REDUCTION, (("skip_connect",),) * 5)
    strided = [isinstance(edge.operations["skip_connect"], FactorizedReduce) for edge in cell.edges]
    assert strided == [True, True, True, True, False]
    assert cell(torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), torch.ones(5, 1)).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("size", [8, 7])
def test_after_a_reduction_the_larger_input_is_halved(size):
    half = (size + 1) // 2
    cell = SearchCell(AFTER_REDUCTION, (("max_pool_3x3",),) * 2)
    out = cell(torch.randn(2, 6, size, size), torch.randn(2, 6, half, half), torch.ones(2, 1))
    assert out.shape == (2, 4, half, half)


def test_an_evaluation_cell_adds_two_edges_a_node_and_concatenates_the_named_nodes():
    cell = EvaluationCell(
        NORMAL, [("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 2), ("avg_pool_3x3", 1)], [3]
    )
    before_last, last = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    s0, s1 = cell.preprocess(before_last, last)
    pooled = nn.functional.avg_pool2d(s1, 3, 1, 1, count_include_pad=False)
    assert torch.allclose(cell(before_last, last, 0.0), s0 + s1 + pooled, atol=1e-6)
    assert all(module.affine for module in cell.modules() if isinstance(module, nn.BatchNorm2d))


def test_identities_are_never_dropped():
    inputs = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    skips = EvaluationCell(NORMAL, [("skip_connect", 0), ("skip_connect", 1)], [2])
    assert torch.equal(skips(*inputs, 0.9), skips(*inputs, 0.0))


@pytest.mark.parametrize("shape", [NORMAL, REDUCTION])
def test_other_branches_are_dropped_in_train_mode_only(shape):
    name = "skip_connect" if shape.is_reduction else "max_pool_3x3"  # at stride 2 a skip is no identity
    cell = EvaluationCell(shape, [(name, 0), (name, 1)], [2])
    inputs = torch.randn(64, 6, 4, 4), torch.randn(64, 6, 4, 4)
    dropped = (cell(*inputs, 0.9) == 0).all(dim=(1, 2, 3)).sum()
    assert 64 * 0.81 - 15 < dropped < 64
    cell.eval()
    assert torch.equal(cell(*inputs, 0.9), cell(*inputs, 0.0))


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    num_samples, probability = 20_000, 0.3
    out = drop_path(torch.ones(num_samples, 2, 2, 1), probability)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    kept = out[:, 0, 0, 0]
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    # Five standard errors of a mean of Bernoulli(.7) / .7.
    assert abs(kept.mean() - 1) < 5 * (0.3 / 0.7 / num_samples) ** 0.5
